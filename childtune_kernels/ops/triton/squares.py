"""The squared-gradient accumulator: one term of the empirical Fisher information (Eq. 10), in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..tensors import TensorList
from .launch import OPTIONS, TRITON_DTYPES, is_aligned, locate, map_blocks, on_device, over, pointer
from .rounding import widened

_ACCUMULATOR, _GRAD, _NUMEL = map(tl.constexpr, range(3))  # fields of the table
_BLOCK = 1024  # elements a program


@triton.jit
def _square_block(
    field,
    n,
    start,
    numel,
    scale,
    GRAD_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    GRAD_ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.arange(0, BLOCK)
    inside = None if FULL else offsets < numel - start
    total_ptr = pointer(tl.load(field + _ACCUMULATOR * n), tl.float32, ALIGNED) + start + offsets
    grad_ptr = pointer(tl.load(field + _GRAD * n), GRAD_DTYPE, GRAD_ALIGNED) + start + offsets
    total = tl.load(total_ptr, mask=inside)
    grad = widened(tl.load(grad_ptr, mask=inside))

    total = total + (grad * grad) * scale

    tl.store(total_ptr, total, mask=inside)


@triton.jit(do_not_specialize=["coarse_shift", "first_row", "n"])
def _square_accumulate_kernel(
    table,
    first_block,
    coarse,
    coarse_shift,
    first_row,
    n,
    scale,
    GRAD_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """accumulator += grad**2 * scale.

    grid: (total blocks,)
    """
    tensor, block = locate(first_block, coarse, coarse_shift)
    field = table + first_row + tensor
    start = block * BLOCK
    numel = tl.load(field + _NUMEL * n)
    if is_aligned(tl.load(field + _ACCUMULATOR * n), tl.float32) & (start + BLOCK <= numel):
        if is_aligned(tl.load(field + _GRAD * n), GRAD_DTYPE):
            _square_block(field, n, start, numel, scale, GRAD_DTYPE, True, True, True, BLOCK)
        else:
            _square_block(field, n, start, numel, scale, GRAD_DTYPE, True, False, True, BLOCK)
    else:
        _square_block(field, n, start, numel, scale, GRAD_DTYPE, False, False, False, BLOCK)


def square_accumulate_(accumulators: Sequence[Tensor], grads: Sequence[Tensor], scale: float) -> None:
    """Launch `reference.square_accumulate_`."""
    if not accumulators:
        return
    device = accumulators[0].device
    accumulators, grads = TensorList.of(accumulators), TensorList.of(grads)
    blocks = map_blocks(device, _BLOCK, accumulators.numels, tuple((dtype,) for dtype in grads.dtypes))
    with on_device(device):
        _, launches = over(device, blocks, (accumulators.addresses, grads.addresses, accumulators.sizes))
        for (dtype,), n_blocks, tables in launches:
            _square_accumulate_kernel[(n_blocks,)](
                **tables, scale=scale, GRAD_DTYPE=TRITON_DTYPES[dtype], BLOCK=_BLOCK, **OPTIONS
            )
