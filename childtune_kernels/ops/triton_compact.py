"""A block of `adamw_compact_`: moments packed in the child's order, weights and full gradients gathered by index."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_launch import pointer, rounded, widened
from .triton_philox import keep_bits_of
from .triton_scalars import advance, scalar

GRAD_PACKED = tl.constexpr(1)  # added to the address of indices whose gradient lies packed, as moments do


@triton.jit
def compact_block(
    addresses,
    key,
    child,
    row,
    start,
    numel,
    BERNOULLI: tl.constexpr,
    PARAM_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    GRAD_ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update entries start .. start + BLOCK - 1 of a packed tensor of ``numel`` entries.

    What lies packed is accessed 16 bytes at a time; indices are int32, because 64-bit ones, or the ranks of bits
    counted here, cost more than they save.
    """
    offsets = tl.arange(0, BLOCK)
    inside = None if FULL else offsets < numel - start
    param, grad_address, exp_avg, exp_avg_sq = addresses
    exp_avg_ptr = pointer(exp_avg, STATE_DTYPE, ALIGNED) + start + offsets
    exp_avg_sq_ptr = pointer(exp_avg_sq, STATE_DTYPE, ALIGNED) + start + offsets
    index = tl.load(pointer(child & ~GRAD_PACKED, tl.int32, ALIGNED) + start + offsets, mask=inside)
    param_ptr = pointer(param, PARAM_DTYPE, False) + index
    old_param = widened(tl.load(param_ptr, mask=inside), INTERPRET)
    old_exp_avg = widened(tl.load(exp_avg_ptr, mask=inside), INTERPRET)
    old_exp_avg_sq = widened(tl.load(exp_avg_sq_ptr, mask=inside), INTERPRET)
    if child & GRAD_PACKED:
        grad = tl.load(pointer(grad_address, PARAM_DTYPE, GRAD_ALIGNED) + start + offsets, mask=inside)
    else:
        grad = tl.load(pointer(grad_address, PARAM_DTYPE, False) + index, mask=inside)
    g = widened(grad, INTERPRET) * scalar(row, 0)
    if BERNOULLI:
        keep = keep_bits_of(index, key, tl.load(row + 11).to(tl.uint32), tl.load(row + 12).to(tl.uint32), 0)
        g = tl.where(keep, g * scalar(row, 1), 0.0)  # Eq. 4

    new_param, new_exp_avg, new_exp_avg_sq = advance(old_param, g, old_exp_avg, old_exp_avg_sq, row)

    tl.store(param_ptr, rounded(new_param, PARAM_DTYPE, INTERPRET), mask=inside)
    tl.store(exp_avg_ptr, rounded(new_exp_avg, STATE_DTYPE, INTERPRET), mask=inside)
    tl.store(exp_avg_sq_ptr, rounded(new_exp_avg_sq, STATE_DTYPE, INTERPRET), mask=inside)
