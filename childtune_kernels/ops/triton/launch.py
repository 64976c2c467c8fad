"""How one Triton launch serves any list of tensors: address tables, and which program works on which block.

A kernel gets one int64 table, field by field, and one program a block of a tensor. Programs find their tensor by a
coarse index and a short scan: a table of (tensor, block) pairs would take 2.6 MB for BERT-large, this takes 16 KB.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

_COARSE_ENTRIES = 4096
INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)

# Arithmetic as written: no fused multiply-add, so that every implementation rounds alike.
OPTIONS = {"enable_fp_fusion": False}


class Launch(NamedTuple):
    """One launch, of all tensors of one combination of dtypes: its programs, and arguments of its kernel by name.

    Attributes:
        dtypes: of each tensor and of what goes with it.
        n_blocks: programs, one a block.
        tables: ``first_row``: where the launch's tensors begin in the table; ``first_block``: int32 [tensors + 1],
            blocks before each tensor; ``coarse``: int32, the tensor of every 2**``coarse_shift``-th block.
    """

    dtypes: tuple[torch.dtype | None, ...]
    n_blocks: int
    tables: dict[str, Any]


class BlockMap(NamedTuple):
    """Which program works on which block of a list of tensors, sorted by dtypes: no ``order`` where it already was."""

    order: list[int] | None
    launches: tuple[Launch, ...]


@functools.lru_cache(maxsize=1024)
def map_blocks(
    device: torch.device, block: int, numels: tuple[int, ...], dtypes: tuple[tuple[torch.dtype | None, ...], ...]
) -> BlockMap:
    """Map the blocks of a list of tensors, one launch a combination of dtypes. Cached: shapes seldom change.

    Making one waits for the device. A pass that packs a 7B model's gradients takes some 290 of them, up to 16 KB each.
    """
    kinds = list(dict.fromkeys(dtypes))
    ranks = [kinds.index(d) for d in dtypes]
    order = sorted(range(len(numels)), key=ranks.__getitem__)
    launches, first_row = [], 0
    for kind, dtype in enumerate(kinds):
        rows = [i for i in order if ranks[i] == kind]
        blocks = [(numels[i] + block - 1) // block for i in rows]
        if n_blocks := sum(blocks):
            first_block = np.concatenate(([0], np.cumsum(blocks)))
            shift = max(0, (n_blocks - 1).bit_length() - _COARSE_ENTRIES.bit_length() + 1)
            coarse = np.searchsorted(first_block, np.arange(0, n_blocks, 1 << shift), side="right") - 1
            index = [torch.from_numpy(a.astype(np.int32)).to(device) for a in (first_block, coarse)]
            tables = dict(first_row=first_row, first_block=index[0], coarse=index[1], coarse_shift=shift)
            launches.append(Launch(dtype, n_blocks, tables))
        first_row += len(rows)
    return BlockMap(None if order == list(range(len(numels))) else order, tuple(launches))


_captured: list[Tensor] = []  # staging that CUDA graphs copy from at every replay: must outlive them


def upload(table: np.ndarray, device: torch.device) -> Tensor:
    """Return a copy of an int64 table on the device, without waiting for it.

    Staged through pinned memory. torch's caching allocator hands a staging block out again only when the copy from
    it has run; under capture the block is kept for good, since every replay copies from it.
    """
    if device.type == "cpu":  # the interpreter
        return torch.from_numpy(np.ascontiguousarray(table))
    host = torch.empty(table.shape, dtype=torch.int64, pin_memory=True)
    host.numpy()[:] = table
    result = host.to(device, non_blocking=True)
    if torch.cuda.is_current_stream_capturing():
        _captured.extend((host, result))
    return result


def over(device: torch.device, blocks: BlockMap, fields: Sequence[np.ndarray]) -> tuple[Tensor, list[Launch]]:
    """Upload a table and return it with the launches over it, whose arguments have the table too.

    Args:
        device: of the tensors.
        blocks: the list's map.
        fields: int64 [n] each, one entry a tensor: what a kernel reads at ``table + field * n + tensor``.
    """
    host = np.stack(fields)
    table = upload(host if blocks.order is None else host[:, blocks.order], device)
    own = dict(table=table, n=host.shape[1])
    return table, [launch._replace(tables=own | launch.tables) for launch in blocks.launches]


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Make ``device`` current: Triton launches there, whatever device the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def locate(first_block, coarse, coarse_shift):
    """Return this program's tensor and its block within the tensor, int64."""
    pid = tl.program_id(0)
    tensor = tl.load(coarse + (pid >> coarse_shift))
    first = tl.load(first_block + tensor)
    following = tl.load(first_block + tensor + 1)  # beside the load above, not after it: latency is what counts here
    while following <= pid:
        tensor += 1
        first = following
        following = tl.load(first_block + tensor + 1)
    return tensor, (pid - first).to(tl.int64)


@triton.jit
def pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Cast a table entry to a pointer. The hint must follow the cast: on the integer it would be lost.

    ALIGNED promises 4 elements, 16 bytes for fp32 and 8 for 16 bit: beside fp32 moments a 16-byte hint on 16-bit
    weights adds a round trip through shared memory (0.85 of the H200's copy bandwidth instead of 0.98).
    """
    result = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        result = tl.multiple_of(result, DTYPE.primitive_bitwidth // 2)
    return result


@triton.jit
def is_aligned(address, DTYPE: tl.constexpr):
    return address % (DTYPE.primitive_bitwidth // 2) == 0
