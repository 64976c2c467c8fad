"""The formula of an update, and every parameter's scalars for it, derived on the device in one small launch.

The rules are `reference.advance_moments`, `advance_weights` and `derive_scalars`; of the last, one lane does one
parameter.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Fields of the table, then the columns of `hyper`; field f of parameter i is at f * n + i.
# KEY: of the mask stream; CHILD: the address of mask words or indices, 0 where the whole tensor is in the child.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, COMPANION, STEP, LR, KEY, ROUNDING_KEY, CHILD, NUMEL, HYPER = map(
    tl.constexpr, range(12)
)
SCALARS = tl.constexpr(16)  # 32-bit words a parameter in the table of derived scalars: one 64-byte line
STEP_BITS, LAST_STEP = tl.constexpr(32), tl.constexpr(2**32 - 1)


@triton.jit(do_not_specialize=["n"])
def begin_kernel(table, scalars, n, grad_scale, found_inf, grad_norm, HAS_LRS: tl.constexpr, BLOCK: tl.constexpr):
    """Advance the step counters and derive every parameter's scalars, in fp64; one lane a parameter.

    grid: (ceil(n / BLOCK),)
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = i < n
    hyper = table + HYPER * n + i
    lr = _fp64(hyper, 0, n, own)
    beta1 = _fp64(hyper, 1, n, own)
    beta2 = _fp64(hyper, 2, n, own)
    eps = _fp64(hyper, 3, n, own)
    weight_decay = _fp64(hyper, 4, n, own)
    p = _fp64(hyper, 5, n, own)
    sign = _fp64(hyper, 6, n, own)
    hf = _fp64(hyper, 7, n, own) != 0
    max_grad_norm = _fp64(hyper, 8, n, own)
    if HAS_LRS:
        lr_ptr = tl.load(table + LR * n + i, mask=own, other=0).to(tl.pointer_type(tl.float32))
        lr = tl.load(lr_ptr, mask=own, other=0.0).to(tl.float64)

    apply = own
    if found_inf is not None:
        apply = own & (tl.load(found_inf + 0 * i) == 0.0)  # a lane each: the interpreter cannot spread a bool
    step_ptr = tl.load(table + STEP * n + i, mask=own, other=0).to(tl.pointer_type(tl.float64))
    step = tl.load(step_ptr, mask=own, other=0.0) + 1.0
    tl.store(step_ptr, step, mask=apply)
    t = tl.minimum(step.to(tl.int64), LAST_STEP)

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
    step_size = lr / (one - power1)
    last_kept = (p * 4294967296.0).to(tl.int64) - 1

    row = scalars + i * SCALARS
    decay_outside = _fp64(hyper, 9, n, own) != 0
    _put(row, 0, sign * clip / scale, own)
    _put(row, 1, one / p, own)
    _put(row, 2, beta1, own)
    _put(row, 3, one - beta1, own)
    _put(row, 4, beta2, own)
    _put(row, 5, one - beta2, own)
    _put(row, 6, eps, own)
    _put(row, 7, tl.where(hf, step_size * sqrt_correction2, step_size), own)
    _put(row, 8, tl.where(hf, one, one / sqrt_correction2), own)
    _put(row, 9, tl.where(hf, 0.0 * one, shrink), own)
    _put(row, 10, tl.where(hf, shrink, 0.0 * one), own)
    tl.store(row + 11, t.to(tl.int32), mask=own)
    tl.store(row + 12, last_kept.to(tl.int32), mask=own)
    tl.store(row + 13, tl.where(apply, 1, 0), mask=own)
    tl.store(row + 14, tl.where(decay_outside, 1, 0), mask=own)


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
def advance(param, g, exp_avg, exp_avg_sq, row):
    """Return the new fp32 (param, exp_avg, exp_avg_sq): the one Triton statement of the formula."""
    exp_avg = scalar(row, 2) * exp_avg + scalar(row, 3) * g  # Alg. 1, line 8
    exp_avg_sq = scalar(row, 4) * exp_avg_sq + scalar(row, 5) * (g * g)  # Alg. 1, line 9
    param = param + scalar(row, 9) * param
    denominator = tl.sqrt_rn(exp_avg_sq) * scalar(row, 8) + scalar(row, 6)
    param = param - scalar(row, 7) * tl.div_rn(exp_avg, denominator)  # Alg. 1, lines 10-12
    param = param + scalar(row, 10) * param
    return param, exp_avg, exp_avg_sq
