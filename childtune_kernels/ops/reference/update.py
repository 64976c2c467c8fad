"""The eager meaning of every op, on any device: slow, readable, and bitwise what the kernels compute.

One written order of IEEE operations, each rounded once. The update of one weight, all in fp32::

    g = grad * grad_multiplier                                    unscale, clip, sign
    g = keep ? g * inv_p : 0                                      Eq. 1-4 (F; in D there is no inv_p)
    m = beta1 * m + (1 - beta1) * g                               Alg. 1, line 8
    v = beta2 * v + (1 - beta2) * (g * g)                         Alg. 1, line 9
    w = w + shrink_before * w                                     decoupled decay, torch dialect
    w = w - step_size * (m / (sqrt(v) * inv_sqrt_correction2 + eps))      Alg. 1, lines 10-12
    w = w + shrink_after * w                                      decoupled decay, hf dialect

The scalars come from `derive_scalars`, in fp64 and rounded to fp32 once. A 16-bit weight is rounded to nearest, or
one of these: ``w`` lives in an fp32 master, and the weight is its copy; ``w`` is the sum of the weight and a
compensation of its dtype, which takes what rounding left over (Kahan); the weight is rounded stochastically. Where
master or sum no longer round to the weight, somebody has replaced the weight since, and ``w`` is the weight.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ... import philox
from .bits import unpack_bits

# Columns of the `hyper` table that every update op takes: float64, one row a parameter.
HYPER_COLUMNS = (
    "lr",
    "beta1",
    "beta2",
    "eps",
    "weight_decay",
    "reserve_p",
    "sign",  # +1 to minimise, -1 to maximise
    "hf_dialect",  # 0 torch, 1 hf
    "max_grad_norm",  # inf: no clipping
)
_PRODUCTS = 1 << 24  # elements of per-example gradients that fisher_linear_ holds at a time: 64 MB
_MIN_NORMAL_HALF = 2.0**-14  # the smallest normal fp16
STEP_BITS = 32  # of t, as the mask stream has it
LAST_STEP = 2**STEP_BITS - 1  # at which t stays, rather than begin again
_WITHIN = 1 - 2.0**-8  # the next 16-bit number below a power of two is at least this share of it


class Scalars(NamedTuple):
    """What one parameter's update needs at one step: fp32 tensors of shape [n], t int64, threshold int64."""

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


def derive_scalars(
    t: Tensor, hyper: Tensor, lrs: Tensor | None, grad_scale: Tensor | None, grad_norm: Tensor | None
) -> Scalars:
    """Derive the fp32 scalars of n parameters, in fp64.

    Args:
        t: int64 [n], the step about to be taken, from 1.
        hyper: float64 [n, len(HYPER_COLUMNS)].
        lrs: float32 [n] learning rates that replace the table's, or None.
        grad_scale: GradScaler's scale, float32 [], or None.
        grad_norm: global norm of the gradients as stored (still scaled), float32 [], or None.
    """
    lr, beta1, beta2, eps, weight_decay, reserve_p, sign, hf, max_grad_norm = hyper.unbind(1)
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
    step_size = lr / correction1
    fp64 = Scalars(
        grad_multiplier=sign * clip / scale,
        inv_p=one / reserve_p,
        beta1=beta1,
        one_minus_beta1=one - beta1,
        beta2=beta2,
        one_minus_beta2=one - beta2,
        eps=eps,
        step_size=torch.where(hf, step_size * sqrt_correction2, step_size),
        inv_sqrt_correction2=torch.where(hf, one, one / sqrt_correction2),
        shrink_before=torch.where(hf, 0.0, shrink),
        shrink_after=torch.where(hf, shrink, 0.0),
    )
    return Scalars(*(column.float() for column in fp64))


def advance_moments(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, s: Scalars) -> tuple[Tensor, Tensor]:
    """Return the new fp32 moments for a gradient that is already masked; ``s`` holds 0-dim tensors."""
    m = s.beta1 * exp_avg.float() + s.one_minus_beta1 * grad  # Alg. 1, line 8
    v = s.beta2 * exp_avg_sq.float() + s.one_minus_beta2 * (grad * grad)  # Alg. 1, line 9
    return m, v


def advance_weights(param: Tensor, m: Tensor, v: Tensor, s: Scalars) -> Tensor:
    """Return the new fp32 weights, given the new fp32 moments."""
    w = param.float()
    w = w + s.shrink_before * w
    w = w - s.step_size * (m / (square_root(v) * s.inv_sqrt_correction2 + s.eps))  # Alg. 1, lines 10-12
    return w + s.shrink_after * w


def decay_weights(param: Tensor, s: Scalars) -> Tensor:
    """Return the fp32 weights after decay alone, what ``decay_all`` does outside the child."""
    w = param.float()
    w = w + s.shrink_before * w
    return w + s.shrink_after * w


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


class _Step:
    """One call's common part: advances the counters, derives the scalars, and writes nothing under found_inf."""

    def __init__(self, steps, hyper, lrs, grad_scale, found_inf, grad_norm, companions=(), rounding_keys=()):
        device = steps[0].device
        grad_scale, found_inf, grad_norm = (
            None if x is None else x.to(device) for x in (grad_scale, found_inf, grad_norm)
        )
        self.skip = None if found_inf is None else found_inf != 0
        self.t = (torch.stack([step.to(torch.int64) for step in steps]) + 1).clamp(max=LAST_STEP)
        columns = derive_scalars(self.t, hyper.to(device), torch.stack(lrs) if lrs else None, grad_scale, grad_norm)
        self.scalars = [Scalars(*row) for row in zip(*(column.unbind() for column in columns), strict=True)]
        for step in steps:
            self.write(step, step + 1)
        self.companions = companions or [None] * len(steps)
        self.rounding_keys = rounding_keys or [None] * len(steps)

    def update_weights(self, i: int, param: Tensor, elements: Tensor, m: Tensor, v: Tensor) -> None:
        """Update ``param``, which holds the given elements of parameter i, from its new moments."""
        companion, key, s = self.companions[i], self.rounding_keys[i], self.scalars[i]
        if companion is None or not companion.numel() or param.dtype == torch.float32:
            w = advance_weights(param, m, v, s)
            if key is not None and param.dtype != torch.float32:
                words = philox.words(elements, key, self.t[i], philox.STOCHASTIC_ROUNDING)
                w = round_stochastically(w, words.view(w.shape), param.dtype)
            self.write(param, w)
        else:
            w = advance_weights(standing_weights(param, companion), m, v, s)
            self.write(companion, w if companion.dtype == torch.float32 else left_over(w, param.dtype))
            self.write(param, w)

    def write(self, target: Tensor, value: Tensor) -> None:
        """Store ``value``, rounded to nearest even if ``target`` is 16 bit."""
        value = value.to(target.dtype)
        target.copy_(value if self.skip is None else torch.where(self.skip, target, value))


def adamw_(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    steps,
    hyper,
    companions,
    rounding_keys,
    lrs=(),
    grad_scale=None,
    found_inf=None,
    grad_norm=None,
) -> None:
    """Update every weight with its whole gradient."""
    keys, hyper = [0] * len(params), _with_p_of_one(hyper)
    lists = (params, grads, exp_avgs, exp_avg_sqs, steps, hyper)
    adamw_bernoulli_(*lists, keys, companions, rounding_keys, lrs, grad_scale, found_inf, grad_norm)


def adamw_bernoulli_(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    steps,
    hyper,
    keys,
    companions,
    rounding_keys,
    lrs=(),
    grad_scale=None,
    found_inf=None,
    grad_norm=None,
) -> None:
    """Child-Tuning_F (Eq. 4): a fresh mask each step, kept gradients times 1/p; every moment and weight decays."""
    none = [torch.empty(0, dtype=torch.int32, device=param.device) for param in params]
    lists = (params, grads, exp_avgs, exp_avg_sqs, steps, hyper)
    adamw_compact_(*lists, none, keys, companions, rounding_keys, lrs, grad_scale, found_inf, grad_norm)


def adamw_masked_(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    steps,
    hyper,
    mask_words,
    decay_all,
    lrs=(),
    grad_scale=None,
    found_inf=None,
    grad_norm=None,
) -> None:
    """Child-Tuning_D (Eq. 1-3): update the child only; outside it moments are not touched, weights at most decay."""
    if not params:
        return
    step = _Step(steps, hyper, lrs, grad_scale, found_inf, grad_norm)
    for param, grad, exp_avg, exp_avg_sq, s, words in zip(
        params, grads, exp_avgs, exp_avg_sqs, step.scalars, mask_words, strict=True
    ):
        m, v = advance_moments(grad.float() * s.grad_multiplier, exp_avg, exp_avg_sq, s)
        new = (advance_weights(param, m, v, s), m, v)
        if words.numel():  # no words: the whole tensor is in the child
            keep = unpack_bits(words, param.numel()).view(param.shape)
            outside = (decay_weights(param, s) if decay_all else param.float(), exp_avg.float(), exp_avg_sq.float())
            new = tuple(torch.where(keep, a, b) for a, b in zip(new, outside, strict=True))
        for target, value in zip((param, exp_avg, exp_avg_sq), new, strict=True):
            step.write(target, value)


def adamw_compact_(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    steps,
    hyper,
    indices,
    keys,
    companions,
    rounding_keys,
    lrs=(),
    grad_scale=None,
    found_inf=None,
    grad_norm=None,
) -> None:
    """Child-Tuning_D with moments of the child alone: entry j of a packed tensor belongs to element indices[j].

    A gradient is parameter-shaped or packed likewise. Inside the child, F's mask applies as in `adamw_bernoulli_`.
    """
    if not params:
        return
    step = _Step(steps, hyper, lrs, grad_scale, found_inf, grad_norm, companions, rounding_keys)
    ps = hyper[:, HYPER_COLUMNS.index("reserve_p")].tolist()
    rows = zip(params, grads, exp_avgs, exp_avg_sqs, step.scalars, indices, keys, step.t, ps, strict=True)
    for i, (param, grad, exp_avg, exp_avg_sq, s, index, key, t, p) in enumerate(rows):
        if exp_avg.numel() == 0:  # nothing of it is in the child
            continue
        whole = not index.numel()
        elements = torch.arange(param.numel(), device=param.device) if whole else index.long()
        flat, packed = param.view(-1), grad.reshape(-1)
        packed = packed if packed.numel() == exp_avg.numel() else packed[elements]
        g = packed.view(exp_avg.shape).float() * s.grad_multiplier  # Eq. 1-3
        if p < 1:
            keep = philox.keep_bits(elements, key, t, p).view(g.shape)
            g = torch.where(keep, g * s.inv_p, 0.0)  # Eq. 4
        m, v = advance_moments(g, exp_avg, exp_avg_sq, s)
        weights = param if whole else flat[elements]
        step.update_weights(i, weights, elements, m, v)
        if not whole:
            flat[elements] = weights
        step.write(exp_avg, m)
        step.write(exp_avg_sq, v)


def _with_p_of_one(hyper: Tensor) -> Tensor:
    hyper = hyper.clone()
    hyper[:, HYPER_COLUMNS.index("reserve_p")] = 1.0
    return hyper


def gather_child_(packed, grads, indices, add) -> None:
    """packed = grad[indices], or packed + that: the child's entries of gradients."""
    for target, grad, index in zip(packed, grads, indices, strict=True):
        entries = torch.index_select(grad.reshape(-1), 0, index)
        target.copy_(target + entries if add else entries)


def square_accumulate_(accumulators, grads, scale) -> None:
    """accumulator = accumulator + (grad * grad) * scale, in fp32: one term of Eq. 10."""
    for accumulator, grad in zip(accumulators, grads, strict=True):
        g = grad.float()
        accumulator.copy_(accumulator + (g * g) * torch.tensor(scale, dtype=torch.float32))


def fisher_linear_(total, d, x) -> None:
    """total[o, i] += sum_b (sum_t d[b, t, o] x[b, t, i])**2: one batch's Eq. 10 of a linear layer's weight."""
    d, x = d.to(total.dtype), x.to(total.dtype)
    if d.shape[1] == 1:  # one position: the square of a product is the product of squares
        total.addmm_(d[:, 0].square().mT, x[:, 0].square())
        return
    chunk = max(1, _PRODUCTS // max(1, total.numel()))
    for d_chunk, x_chunk in zip(d.split(chunk), x.split(chunk), strict=True):
        total += torch.bmm(d_chunk.mT, x_chunk).square_().sum(0)


def fisher_columns_(total, d, factor=None, plain_total=None) -> None:
    """total[o] += sum_b (sum_t d[b, t, o] factor[b, t, o])**2: a scale's, without factor a shift's Eq. 10."""
    d = d.to(total.dtype)
    total += (d if factor is None else d * factor).sum(1).square_().sum(0)
    if plain_total is not None:
        plain_total += d.sum(1).square_().sum(0)
