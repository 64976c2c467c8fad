"""The formula of an update, and every parameter's scalars for it, derived on the device in one small launch.

The rules are `reference.adamw`'s `advance`, `step_size` and `derive_scalars`; of the last, one lane does one parameter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..reference import adamw as reference
from ..update import HYPER_COLUMNS

# Fields of the table, which are lists of `Update`, then the columns of its `hyper`; field f of parameter i is at
# f * n + i. CHILDREN: the addresses of mask words or indices, 0 where the whole tensor is in the child.
PARAMS, GRADS, EXP_AVGS, EXP_AVG_SQS, COMPANIONS, STEPS = map(tl.constexpr, range(6))
LRS, MASK_KEYS, ROUNDING_KEYS, CHILDREN, NUMELS, HYPER = map(tl.constexpr, range(6, 12))
HYPER_LR, HYPER_BETA1, HYPER_BETA2, HYPER_EPS, HYPER_WEIGHT_DECAY = map(tl.constexpr, range(5))
HYPER_RESERVE_P, HYPER_SIGN, HYPER_HF, HYPER_MAX_GRAD_NORM, HYPER_DECAY_OUTSIDE = map(tl.constexpr, range(5, 10))
assert HYPER_DECAY_OUTSIDE.value == len(HYPER_COLUMNS) - 1

# The 32-bit words of a parameter's row in the table of derived scalars, one 64-byte line: fp32 as in
# `reference.adamw.Scalars`, then integers.
SCALARS = tl.constexpr(16)
GRAD_MULTIPLIER, INV_P, BETA1, ONE_MINUS_BETA1, BETA2, ONE_MINUS_BETA2 = map(tl.constexpr, range(6))
EPS, STEP_SIZE, INV_SQRT_CORRECTION2, SHRINK_BEFORE, SHRINK_AFTER = map(tl.constexpr, range(6, 11))
STREAM_STEP = tl.constexpr(11)  # the mask stream's t
LAST_KEPT = tl.constexpr(12)  # the largest random word that F keeps
APPLY = tl.constexpr(13)  # 0 where the gradients overflowed: nothing is written
DECAY_OUTSIDE = tl.constexpr(14)  # not 0: weights outside the child decay

STEP_BITS, LAST_STEP = tl.constexpr(reference.STEP_BITS), tl.constexpr(reference.LAST_STEP)
TWO_TO_32 = tl.constexpr(2.0**32)


@triton.jit(do_not_specialize=["n"])
def begin_kernel(
    table,
    scalars,
    n,
    grad_scale,
    found_inf,
    grad_norm,
    STEP_SIZE_OF: tl.constexpr,
    HAS_LRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Advance the step counters and derive every parameter's scalars, in fp64; one lane a parameter.

    STEP_SIZE_OF: the rule's `step_size`.
    grid: (ceil(n / BLOCK),)
    """
    # load
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = i < n
    hyper = table + HYPER * n + i
    lr = _fp64(hyper, HYPER_LR, n, own)
    beta1 = _fp64(hyper, HYPER_BETA1, n, own)
    beta2 = _fp64(hyper, HYPER_BETA2, n, own)
    eps = _fp64(hyper, HYPER_EPS, n, own)
    weight_decay = _fp64(hyper, HYPER_WEIGHT_DECAY, n, own)
    p = _fp64(hyper, HYPER_RESERVE_P, n, own)
    sign = _fp64(hyper, HYPER_SIGN, n, own)
    hf = _fp64(hyper, HYPER_HF, n, own) != 0
    max_grad_norm = _fp64(hyper, HYPER_MAX_GRAD_NORM, n, own)
    decay_outside = _fp64(hyper, HYPER_DECAY_OUTSIDE, n, own) != 0
    if HAS_LRS:
        lr_ptr = tl.load(table + LRS * n + i, mask=own, other=0).to(tl.pointer_type(tl.float32))
        lr = tl.load(lr_ptr, mask=own, other=0.0).to(tl.float64)

    # advance the counters
    apply = own
    if found_inf is not None:
        apply = own & (tl.load(found_inf + 0 * i) == 0.0)  # a lane each: the interpreter cannot spread a bool
    step_ptr = tl.load(table + STEPS * n + i, mask=own, other=0).to(tl.pointer_type(tl.float64))
    step = tl.load(step_ptr, mask=own, other=0.0) + 1.0
    tl.store(step_ptr, step, mask=apply)
    t = tl.minimum(step.to(tl.int64), LAST_STEP)

    # derive
    one = tl.full([BLOCK], 1.0, tl.float64)
    scale = one
    if grad_scale is not None:
        scale = tl.load(grad_scale).to(tl.float64) * one
    clip = one
    if grad_norm is not None:
        clip = max_grad_norm / (tl.load(grad_norm).to(tl.float64) / scale + 1e-6)
        clip = tl.where(clip >= one, one, clip)
    power1, power2 = one, one
    base1, base2 = beta1, beta2
    for bit in tl.static_range(STEP_BITS):
        odd = ((t >> bit) & 1) == 1
        power1 = tl.where(odd, power1 * base1, power1)
        power2 = tl.where(odd, power2 * base2, power2)
        base1 = base1 * base1
        base2 = base2 * base2
    sqrt_correction2 = tl.sqrt(one - power2)
    shrink = 0.0 - lr * weight_decay
    size, inv_sqrt_correction2 = STEP_SIZE_OF(lr, one - power1, sqrt_correction2, hf)
    last_kept = (p * TWO_TO_32).to(tl.int64) - 1

    # store
    row = scalars + i * SCALARS
    _put(row, GRAD_MULTIPLIER, sign * clip / scale, own)
    _put(row, INV_P, one / p, own)
    _put(row, BETA1, beta1, own)
    _put(row, ONE_MINUS_BETA1, one - beta1, own)
    _put(row, BETA2, beta2, own)
    _put(row, ONE_MINUS_BETA2, one - beta2, own)
    _put(row, EPS, eps, own)
    _put(row, STEP_SIZE, size, own)
    _put(row, INV_SQRT_CORRECTION2, inv_sqrt_correction2, own)
    _put(row, SHRINK_BEFORE, tl.where(hf, 0.0 * one, shrink), own)
    _put(row, SHRINK_AFTER, tl.where(hf, shrink, 0.0 * one), own)
    tl.store(row + STREAM_STEP, t.to(tl.int32), mask=own)
    tl.store(row + LAST_KEPT, last_kept.to(tl.int32), mask=own)
    tl.store(row + APPLY, tl.where(apply, 1, 0), mask=own)
    tl.store(row + DECAY_OUTSIDE, tl.where(decay_outside, 1, 0), mask=own)


@triton.jit
def _fp64(hyper, COLUMN: tl.constexpr, n, own):
    return tl.load(hyper + COLUMN * n, mask=own, other=1).to(tl.float64, bitcast=True)


@triton.jit
def _put(row, COLUMN: tl.constexpr, value, own):
    tl.store(row + COLUMN, value.to(tl.float32).to(tl.int32, bitcast=True), mask=own)


@triton.jit
def scalar(row, COLUMN: tl.constexpr):
    """Read one fp32 scalar of a parameter's row."""
    return tl.load(row + COLUMN).to(tl.float32, bitcast=True)


@triton.jit
def unsigned(row, COLUMN: tl.constexpr):
    """Read one integer of a parameter's row, uint32."""
    return tl.load(row + COLUMN).to(tl.uint32)


@triton.jit
def step_size(lr, correction1, sqrt_correction2, hf):
    """Return step_size and inv_sqrt_correction2: corrections for moments that began at 0."""
    size = lr / correction1
    return tl.where(hf, size * sqrt_correction2, size), tl.where(hf, 1.0, 1.0 / sqrt_correction2)


@triton.jit
def advance(param, g, moments, row):
    """Return the new fp32 param and moments: the one Triton statement of the formula."""
    exp_avg, exp_avg_sq = moments
    exp_avg = scalar(row, BETA1) * exp_avg + scalar(row, ONE_MINUS_BETA1) * g  # Alg. 1, line 8
    exp_avg_sq = scalar(row, BETA2) * exp_avg_sq + scalar(row, ONE_MINUS_BETA2) * (g * g)  # Alg. 1, line 9
    param = param + scalar(row, SHRINK_BEFORE) * param
    denominator = tl.sqrt_rn(exp_avg_sq) * scalar(row, INV_SQRT_CORRECTION2) + scalar(row, EPS)
    param = param - scalar(row, STEP_SIZE) * tl.div_rn(exp_avg, denominator)  # Alg. 1, lines 10-12
    param = param + scalar(row, SHRINK_AFTER) * param
    return param, (exp_avg, exp_avg_sq)
