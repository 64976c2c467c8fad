"""How 16-bit weights stand for fp32 ones.

A 16-bit weight is rounded to nearest, or one of these: ``w`` lives in an fp32 master, and the weight is its copy; ``w``
is the sum of the weight and a compensation of its dtype, which takes what rounding left over (Kahan); the weight is
rounded stochastically. Where master or sum no longer round to the weight, somebody has replaced the weight since, and
``w`` is the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MIN_NORMAL_HALF = 2.0**-14  # the smallest normal fp16
_WITHIN = 1 - 2.0**-8  # the next 16-bit number below a power of two is at least this share of it


def standing_weights(param: Tensor, companion: Tensor) -> Tensor:
    """Return the fp32 weights that 16-bit ones and their companions stand for, or the weights that were replaced."""
    w = param.float()
    exact = companion if companion.dtype == torch.float32 else w + companion.float()
    return torch.where(exact.to(param.dtype) == param, exact, w)


def left_over(w: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what rounding fp32 weights to nearest leaves over, in their dtype, such that the sum rounds to them again.

    Rounded itself, it may reach half a unit of a weight, from where the sum goes to the weight's neighbour.
    """
    near = w.to(dtype)
    left = (w - near.float()).to(dtype)
    return torch.where((near.float() + left.float()).to(dtype) == near, left, (left.float() * _WITHIN).to(dtype))


def round_stochastically(x: Tensor, words: Tensor, dtype: torch.dtype) -> Tensor:
    """Round fp32 to one of the two nearest 16-bit values, up with the probability of the distance: on average exact.

    Random bits are added below the last bit kept, then cut off. Below fp16's smallest normal number the last bit has
    a fixed weight: there the magnitude is moved up by that number while this happens.

    Args:
        words: 32 random bits each, int64, shaped like ``x``; the highest bits are used.
        dtype: bfloat16 or float16.
    """
    cut = 16 if dtype == torch.bfloat16 else 13
    magnitude = x.abs()
    small = (magnitude < _MIN_NORMAL_HALF) & (dtype == torch.float16)
    moved = torch.where(small, magnitude + _MIN_NORMAL_HALF, magnitude)
    bits = (moved.view(torch.int32) + (words >> (32 - cut)).to(torch.int32)) >> cut << cut
    moved = bits.view(torch.float32)
    rounded = torch.where(small, moved - _MIN_NORMAL_HALF, moved).copysign(x)
    return torch.where(x.isfinite(), rounded, x).to(dtype)
