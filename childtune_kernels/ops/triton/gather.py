"""`gather_child_` in Triton: the child's entries of many gradients in one launch."""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl

from ..tensors import TensorList
from .launch import OPTIONS, TRITON_DTYPES, is_aligned, layout, locate, on_device, pointer, upload
from .rounding import rounded, widened

_PACKED, _GRAD, _INDICES, _NUMEL = map(tl.constexpr, range(4))  # fields of the table
_BLOCK = 512


@triton.jit
def _gather_block(
    addresses, start, numel, ADD: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    packed, grad, indices = addresses
    offsets = tl.arange(0, BLOCK)
    inside = None if FULL else offsets < numel - start
    index = tl.load(pointer(indices, tl.int32, ALIGNED) + start + offsets, mask=inside)
    packed_ptr = pointer(packed, DTYPE, ALIGNED) + start + offsets
    entries = tl.load(pointer(grad, DTYPE, False) + index, mask=inside)
    if ADD:
        total = widened(tl.load(packed_ptr, mask=inside)) + widened(entries)
        entries = rounded(total, DTYPE)
    tl.store(packed_ptr, entries, mask=inside)


@triton.jit(do_not_specialize=["coarse_shift", "first_row", "n"])
def _gather_kernel(
    table, first_block, coarse, coarse_shift, first_row, n,
    ADD: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """packed = grad[indices], or packed + that.

    grid: (total blocks,)
    """
    tensor, block = locate(first_block, coarse, coarse_shift)
    field = table + first_row + tensor
    addresses = (tl.load(field + _PACKED * n), tl.load(field + _GRAD * n), tl.load(field + _INDICES * n))
    numel = tl.load(field + _NUMEL * n)
    start = block * BLOCK
    if is_aligned(addresses[0], DTYPE) & is_aligned(addresses[2], tl.int32) & (start + BLOCK <= numel):
        _gather_block(addresses, start, numel, ADD, DTYPE, True, True, BLOCK)
    else:
        _gather_block(addresses, start, numel, ADD, DTYPE, False, False, BLOCK)


def gather_child_(packed, grads, indices, add) -> None:
    """Launch `reference.gather_child_`."""
    if not packed:
        return
    device, n = packed[0].device, len(packed)
    packed, grads, indices = map(TensorList.of, (packed, grads, indices))
    plan = layout(device, _BLOCK, packed.numels, tuple((dtype,) for dtype in grads.dtypes))
    host = np.stack((packed.addresses, grads.addresses, indices.addresses, plan.numels))
    if plan.order is not None:
        host = host[:, plan.order]
    with on_device(device):
        table = upload(host, device)
        for launch in plan.launches:
            _gather_kernel[(launch.n_blocks,)](
                table,
                launch.first_block,
                launch.coarse,
                launch.coarse_shift,
                launch.first_row,
                n,
                ADD=add,
                DTYPE=TRITON_DTYPES[launch.dtypes[0]],
                BLOCK=_BLOCK,
                **OPTIONS,
            )
