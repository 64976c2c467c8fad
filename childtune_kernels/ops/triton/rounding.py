"""How a 16-bit weight stands for an fp32 one, and plain conversions that Triton's interpreter gets wrong.

The rules are those of `reference.rounding`: a master, a compensation, stochastic rounding, or none of these.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import INTERPRET

# What lies beside the weights of a launch: COMPENSATION of their dtype, or an fp32 MASTER.
NO_COMPANION, COMPENSATION, MASTER = map(tl.constexpr, range(3))
_MIN_NORMAL_HALF = tl.constexpr(2.0**-14)
_WITHIN = tl.constexpr(1 - 2.0**-8)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """Round fp32 to DTYPE, to nearest even. Triton's interpreter would truncate to bfloat16."""
    if INTERPRET and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        half = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        half = tl.where(x == x, half, 0x7FC0).to(tl.uint16)  # a NaN must not round up to infinity
        return half.to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def widened(x):
    """Widen to fp32. Triton's interpreter gets bfloat16 subnormals wrong."""
    if INTERPRET and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def rounded_stochastically(x, random_words, DTYPE: tl.constexpr):
    """Round fp32 to DTYPE, up with the probability of the distance; see `reference.rounding`."""
    CUT: tl.constexpr = 16 if DTYPE == tl.bfloat16 else 13
    sign = x.to(tl.uint32, bitcast=True) & 0x80000000
    magnitude = (x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    shift = tl.where((magnitude < _MIN_NORMAL_HALF) & (DTYPE == tl.float16), _MIN_NORMAL_HALF, 0.0)
    bits = ((magnitude + shift).to(tl.uint32, bitcast=True) + (random_words >> (32 - CUT))) >> CUT << CUT
    result = bits.to(tl.float32, bitcast=True) - shift
    result = (result.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    finite = (x.to(tl.uint32, bitcast=True) & 0x7F800000) != 0x7F800000
    return rounded(tl.where(finite, result, x), DTYPE)


@triton.jit
def load_weights(param_ptr, companion_ptr, inside, COMPANION: tl.constexpr):
    """Return the fp32 weights, wherever their bits are, and what is stored; see `reference.rounding`."""
    DTYPE: tl.constexpr = param_ptr.dtype.element_ty
    stored = tl.load(param_ptr, mask=inside)
    param = widened(stored)
    if COMPANION == MASTER:
        master = tl.load(companion_ptr, mask=inside)
        param = tl.where(widened(rounded(master, DTYPE)) == param, master, param)
    elif COMPANION == COMPENSATION:
        exact = param + widened(tl.load(companion_ptr, mask=inside))
        param = tl.where(widened(rounded(exact, DTYPE)) == param, exact, param)
    return param, stored


@triton.jit
def changed(new, stored, inside):
    """Return where the bits of 16-bit weights change: a scattered store costs memory a sector of 16 of them.

    At learning rates of fine-tuning most stay as they are: D with masters takes 0.89 ms so and 1.04 if it stores all
    (H100, BERT-large, bf16, random p = 0.1, lr 1e-5).
    """
    differ = new.to(tl.uint16, bitcast=True) != stored.to(tl.uint16, bitcast=True)
    return differ if inside is None else inside & differ


@triton.jit
def _left_over(x, near, DTYPE: tl.constexpr):
    """Return what rounding left over; see `reference.rounding`."""
    left = rounded(x - near, DTYPE)
    wide = widened(left)
    again = widened(rounded(near + wide, DTYPE))
    return tl.where(again == near, left, rounded(wide * _WITHIN, DTYPE))


@triton.jit
def store_weights(
    param, param_ptr, companion_ptr, stored, random_words, inside,
    COMPANION: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Round fp32 weights into their tensor, and what that loses into their companion.

    ``stored``, what 16-bit weights were, leaves those that do not change unwritten; None writes all.
    """
    DTYPE: tl.constexpr = param_ptr.dtype.element_ty
    SPARSE: tl.constexpr = stored is not None and DTYPE != tl.float32
    if STOCHASTIC:
        new = rounded_stochastically(param, random_words, DTYPE)
        tl.store(param_ptr, new, mask=changed(new, stored, inside) if SPARSE else inside)
    else:
        near = rounded(param, DTYPE)
        tl.store(param_ptr, near, mask=changed(near, stored, inside) if SPARSE else inside)
        if COMPANION == MASTER:
            tl.store(companion_ptr, param, mask=inside)
        elif COMPANION == COMPENSATION:
            tl.store(companion_ptr, _left_over(param, widened(near), DTYPE), mask=inside)
