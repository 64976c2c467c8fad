"""Eq. 10: sums of squared gradients, of a batch or of each example."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_PRODUCTS = 1 << 24  # elements of per-example gradients that fisher_linear_ holds at a time: 64 MB


def square_accumulate_(accumulators: Sequence[Tensor], grads: Sequence[Tensor], scale: float) -> None:
    """accumulator = accumulator + (grad * grad) * scale, in fp32: one term of Eq. 10."""
    for accumulator, grad in zip(accumulators, grads, strict=True):
        g = grad.float()
        accumulator.copy_(accumulator + (g * g) * torch.tensor(scale, dtype=torch.float32))


def fisher_linear_(total: Tensor, d: Tensor, x: Tensor) -> None:
    """total[o, i] += sum_b (sum_t d[b, t, o] x[b, t, i])**2: one batch's Eq. 10 of a linear layer's weight."""
    d, x = d.to(total.dtype), x.to(total.dtype)
    if d.shape[1] == 1:  # one position: the square of a product is the product of squares
        total.addmm_(d[:, 0].square().mT, x[:, 0].square())
        return
    chunk = max(1, _PRODUCTS // max(1, total.numel()))
    for d_chunk, x_chunk in zip(d.split(chunk), x.split(chunk), strict=True):
        total += torch.bmm(d_chunk.mT, x_chunk).square_().sum(0)


def fisher_columns_(total: Tensor, d: Tensor, factor: Tensor | None = None, plain_total: Tensor | None = None) -> None:
    """total[o] += sum_b (sum_t d[b, t, o] factor[b, t, o])**2: a scale's, without factor a shift's Eq. 10."""
    d = d.to(total.dtype)
    total += (d if factor is None else d * factor).sum(1).square_().sum(0)
    if plain_total is not None:
        plain_total += d.sum(1).square_().sum(0)
