"""`gather_child_` in Triton: the child's entries of many gradients in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..tensors import TensorList
from .launch import OPTIONS, TRITON_DTYPES, is_aligned, locate, map_blocks, on_device, over, pointer
from .rounding import rounded, widened

_PACKED, _GRAD, _INDICES, _NUMEL = map(tl.constexpr, range(4))  # fields of the table
_BLOCK = 512


@triton.jit
def _gather_block(
    addresses, start, numel, ADD: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # load the child's places, and the entries that are there
    packed, grad, indices = addresses
    offsets = tl.arange(0, BLOCK)
    inside = None if FULL else offsets < numel - start
    index = tl.load(pointer(indices, tl.int32, ALIGNED) + start + offsets, mask=inside)
    packed_ptr = pointer(packed, DTYPE, ALIGNED) + start + offsets
    entries = tl.load(pointer(grad, DTYPE, False) + index, mask=inside)
    # add and store
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


def gather_child_(packed: Sequence[Tensor], grads: Sequence[Tensor], indices: Sequence[Tensor], add: bool) -> None:
    """Launch `reference.gather_child_`."""
    if not packed:
        return
    device = packed[0].device
    packed, grads, indices = map(TensorList.of, (packed, grads, indices))
    blocks = map_blocks(device, _BLOCK, packed.numels, tuple((dtype,) for dtype in grads.dtypes))
    with on_device(device):
        _, launches = over(device, blocks, (packed.addresses, grads.addresses, indices.addresses, packed.sizes))
        for (dtype,), n_blocks, tables in launches:
            _gather_kernel[(n_blocks,)](**tables, ADD=add, DTYPE=TRITON_DTYPES[dtype], BLOCK=_BLOCK, **OPTIONS)
