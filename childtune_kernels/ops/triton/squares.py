"""The squared-gradient accumulator: one term of the empirical Fisher information (Eq. 10), in one launch."""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl

from ..tensors import TensorList
from .launch import OPTIONS, TRITON_DTYPES, is_aligned, layout, locate, on_device, pointer, upload
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


def square_accumulate_(accumulators, grads, scale) -> None:
    """Launch `reference.square_accumulate_`."""
    if not accumulators:
        return
    device, n = accumulators[0].device, len(accumulators)
    accumulators, grads = TensorList.of(accumulators), TensorList.of(grads)
    plan = layout(device, _BLOCK, accumulators.numels, tuple((dtype,) for dtype in grads.dtypes))
    host = np.stack((accumulators.addresses, grads.addresses, plan.numels))
    if plan.order is not None:
        host = host[:, plan.order]
    with on_device(device):
        table = upload(host, device)
        for launch in plan.launches:
            _square_accumulate_kernel[(launch.n_blocks,)](
                table,
                launch.first_block,
                launch.coarse,
                launch.coarse_shift,
                launch.first_row,
                n,
                scale,
                GRAD_DTYPE=TRITON_DTYPES[launch.dtypes[0]],
                BLOCK=_BLOCK,
                **OPTIONS,
            )
