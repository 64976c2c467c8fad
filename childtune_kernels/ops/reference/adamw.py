"""The formula of an update, and the scalars of one parameter at one step.

One written order of IEEE operations, each rounded once. The update of one weight, all in fp32::

    g = grad * grad_multiplier                                    unscale, clip, sign
    g = keep ? g * inv_p : 0                                      Eq. 4 (F; without it there is no inv_p)
    m = beta1 * m + (1 - beta1) * g                               Alg. 1, line 8
    v = beta2 * v + (1 - beta2) * (g * g)                         Alg. 1, line 9
    w = w + shrink_before * w                                     decoupled decay, torch dialect
    w = w - step_size * (m / (sqrt(v) * inv_sqrt_correction2 + eps))      Alg. 1, lines 10-12
    w = w + shrink_after * w                                      decoupled decay, hf dialect

The scalars come from `derive_scalars`, in fp64 and rounded to fp32 once. How 16-bit weights hold ``w``: `rounding`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

STEP_BITS = 32  # of t, as the mask stream has it
LAST_STEP = 2**STEP_BITS - 1  # at which t stays, rather than begin again


class Scalars(NamedTuple):
    """What one parameter's update needs at one step: fp32 tensors of shape [n]."""

    grad_multiplier: Tensor
    inv_p: Tensor
    beta1: Tensor
    one_minus_beta1: Tensor
    beta2: Tensor
    one_minus_beta2: Tensor
    eps: Tensor
    step_size: Tensor
    inv_sqrt_correction2: Tensor
    shrink_before: Tensor
    shrink_after: Tensor


def integer_power(base: Tensor, exponent: Tensor) -> Tensor:
    """Return ``base ** exponent`` by squaring: multiplications only, so every implementation agrees to the bit."""
    power = torch.ones_like(base)
    for bit in range(STEP_BITS):
        power = torch.where((exponent >> bit & 1).bool(), power * base, power)
        base = base * base
    return power


def square_root(x: Tensor) -> Tensor:
    """Return the correctly rounded square root.

    On CPU torch.sqrt calls MKL's vector library, which is one ulp off for 16 % of fp32 and 1.2 % of fp64 values
    (torch 2.13.0, AVX-512), so numpy takes its place there.
    """
    return torch.from_numpy(np.asarray(np.sqrt(x.numpy()))) if x.device.type == "cpu" else torch.sqrt(x)


def step_size(lr: Tensor, correction1: Tensor, sqrt_correction2: Tensor, hf: Tensor) -> tuple[Tensor, Tensor]:
    """Return step_size and inv_sqrt_correction2: corrections for moments that began at 0."""
    size = lr / correction1
    inverse = torch.where(hf, torch.ones_like(lr), torch.ones_like(lr) / sqrt_correction2)
    return torch.where(hf, size * sqrt_correction2, size), inverse


def derive_scalars(
    step_size: Callable[..., tuple[Tensor, Tensor]],
    t: Tensor,
    hyper: Tensor,
    lrs: Tensor | None,
    grad_scale: Tensor | None,
    grad_norm: Tensor | None,
) -> Scalars:
    """Derive the fp32 scalars of n parameters, in fp64.

    Args:
        step_size: the rule's.
        t: int64 [n], the step about to be taken, from 1.
        hyper: float64 [n, len(HYPER_COLUMNS)].
        lrs: float32 [n] learning rates that replace the table's, or None.
        grad_scale: GradScaler's scale, float32 [], or None.
        grad_norm: global norm of the gradients as stored (still scaled), float32 [], or None.
    """
    lr, beta1, beta2, eps, weight_decay, reserve_p, sign, hf, max_grad_norm, _ = hyper.unbind(1)
    if lrs is not None:
        lr = lrs.double()
    one = torch.ones_like(lr)
    hf = hf != 0
    scale = one if grad_scale is None else grad_scale.double() * one
    clip = one
    if grad_norm is not None:
        clip = max_grad_norm / (grad_norm.double() / scale + 1e-6)
        clip = torch.where(clip >= 1, one, clip)  # a NaN norm stays NaN, as in clip_grad_norm_
    correction1 = one - integer_power(beta1, t)
    sqrt_correction2 = square_root(one - integer_power(beta2, t))
    shrink = 0.0 - lr * weight_decay  # +0 where there is no decay, so that w + 0 * w is w, signed zeros included
    size, inv_sqrt_correction2 = step_size(lr, correction1, sqrt_correction2, hf)
    fp64 = Scalars(
        grad_multiplier=sign * clip / scale,
        inv_p=one / reserve_p,
        beta1=beta1,
        one_minus_beta1=one - beta1,
        beta2=beta2,
        one_minus_beta2=one - beta2,
        eps=eps,
        step_size=size,
        inv_sqrt_correction2=inv_sqrt_correction2,
        shrink_before=torch.where(hf, 0.0, shrink),
        shrink_after=torch.where(hf, shrink, 0.0),
    )
    return Scalars(*(column.float() for column in fp64))


def advance(w: Tensor, grad: Tensor, moments: Sequence[Tensor], s: Scalars) -> tuple[Tensor, Sequence[Tensor]]:
    """Return the new weights and moments for a gradient that is already masked.

    Args:
        w, grad, moments: fp32.
        s: 0-dim tensors.
    """
    exp_avg, exp_avg_sq = moments
    m = s.beta1 * exp_avg + s.one_minus_beta1 * grad  # Alg. 1, line 8
    v = s.beta2 * exp_avg_sq + s.one_minus_beta2 * (grad * grad)  # Alg. 1, line 9
    w = w + s.shrink_before * w
    w = w - s.step_size * (m / (square_root(v) * s.inv_sqrt_correction2 + s.eps))  # Alg. 1, lines 10-12
    return w + s.shrink_after * w, (m, v)


def decay_weights(param: Tensor, s: Scalars) -> Tensor:
    """Return the fp32 weights after decay alone, what ``decay_outside`` does outside the child."""
    w = param.float()
    w = w + s.shrink_before * w
    return w + s.shrink_after * w
