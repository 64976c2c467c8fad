"""Eq. 10 of a linear layer in Triton: per-example weight gradients that exist only as accumulators.

One loop over (example, step along the positions), as in a plain product; where an example ends, the tile of its
gradient is squared into a second accumulator. It costs a weight gradient's arithmetic and no memory. Sums in tiles have
the order of the tiles, not one for every implementation, so multiply-adds may be fused here.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .launch import INTERPRET, on_device
from .rounding import widened


@triton.jit(do_not_specialize=["examples", "positions"])
def _fisher_linear_kernel(
    total,
    d,
    x,
    examples,
    positions,
    n_rows,
    n_columns,
    d_example,
    d_position,
    x_example,
    x_position,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    BAND: tl.constexpr,
):
    """total[o, i] += sum_b (sum_t d[b, t, o] x[b, t, i])**2; strides in elements.

    EVEN says that tiles and steps fit exactly and that examples follow each other as positions do: then one pointer
    walks through, and loads need no mask (0.083 ms instead of 0.107 for bfloat16, 32 x 128 x 4096 x 1024, H200).

    grid: (tiles,), in bands of BAND tiles of rows, so that programs at work together share operands in L2
    """
    tiles_of_rows = tl.cdiv(n_rows, ROWS)
    in_band = BAND * tl.cdiv(n_columns, COLUMNS)
    band = tl.program_id(0) // in_band
    height = min(tiles_of_rows - band * BAND, BAND)
    within = tl.program_id(0) % in_band
    rows = (band * BAND + within % height) * ROWS + tl.arange(0, ROWS)
    columns = within // height * COLUMNS + tl.arange(0, COLUMNS)
    along = tl.arange(0, STEP)
    own_rows = (rows < n_rows)[None, :]
    own_columns = (columns < n_columns)[None, :]
    d_ptr = d + along[:, None].to(tl.int64) * d_position + rows[None, :]
    x_ptr = x + along[:, None].to(tl.int64) * x_position + columns[None, :]
    steps = tl.cdiv(positions, STEP)
    left = steps
    gradient = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(0, examples * steps):
        if EVEN:
            d_tile = tl.load(d_ptr)
            x_tile = tl.load(x_ptr)
            d_ptr += STEP * d_position
            x_ptr += STEP * x_position
        else:
            example = (step // steps).to(tl.int64)
            position = step % steps * STEP
            inside = (position + along < positions)[:, None]
            d_at = example * d_example + position.to(tl.int64) * d_position
            x_at = example * x_example + position.to(tl.int64) * x_position
            d_tile = tl.load(d_ptr + d_at, mask=inside & own_rows, other=0.0)
            x_tile = tl.load(x_ptr + x_at, mask=inside & own_columns, other=0.0)
        if INTERPRET:  # its products take bfloat16 for integers
            d_tile = widened(d_tile)
            x_tile = widened(x_tile)
        gradient = tl.dot(tl.trans(d_tile), x_tile, gradient, input_precision="ieee")
        left -= 1
        if left == 0:  # the example ends
            squares += gradient * gradient
            gradient = tl.zeros([ROWS, COLUMNS], tl.float32)
            left = steps
    owned = (rows < n_rows)[:, None] & own_columns
    total_ptr = total + rows[:, None].to(tl.int64) * n_columns + columns[None, :]
    tl.store(total_ptr, tl.load(total_ptr, mask=owned, other=0.0) + squares, mask=owned)


@triton.jit(do_not_specialize=["examples", "positions"])
def _fisher_columns_kernel(
    total,
    plain_total,
    d,
    factor,
    examples,
    positions,
    n_columns,
    d_example,
    d_position,
    factor_example,
    factor_position,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """total[o] += sum_b (sum_t d[b, t, o] factor[b, t, o])**2, plain_total the same without factor.

    grid: (ceil(n_columns / COLUMNS),): a column belongs to one program, so that sums have one order
    """
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    own = columns < n_columns
    along = tl.arange(0, ROWS)
    steps = tl.cdiv(positions, ROWS)
    scaled = tl.zeros([ROWS, COLUMNS], tl.float32)
    plain = tl.zeros([ROWS, COLUMNS], tl.float32)
    scaled_squares = tl.zeros([COLUMNS], tl.float32)
    plain_squares = tl.zeros([COLUMNS], tl.float32)
    for step in range(0, examples * steps):
        example = (step // steps).to(tl.int64)
        position = step % steps * ROWS + along
        inside = (position < positions)[:, None] & own[None, :]
        at = position[:, None].to(tl.int64)
        value = tl.load(d + example * d_example + at * d_position + columns[None, :], mask=inside, other=0.0)
        value = widened(value)
        if plain_total is not None:
            plain += value
        if factor is not None:
            factor_ptr = factor + example * factor_example + at * factor_position + columns[None, :]
            value = value * widened(tl.load(factor_ptr, mask=inside, other=0.0))
        scaled += value
        if step % steps == steps - 1:
            gradient = tl.sum(scaled, axis=0)
            scaled_squares += gradient * gradient
            scaled = tl.zeros([ROWS, COLUMNS], tl.float32)
            if plain_total is not None:
                gradient = tl.sum(plain, axis=0)
                plain_squares += gradient * gradient
                plain = tl.zeros([ROWS, COLUMNS], tl.float32)
    tl.store(total + columns, tl.load(total + columns, mask=own, other=0.0) + scaled_squares, mask=own)
    if plain_total is not None:
        plain_ptr = plain_total + columns
        tl.store(plain_ptr, tl.load(plain_ptr, mask=own, other=0.0) + plain_squares, mask=own)


_COLUMN_TILE = 16  # one 32-byte sector of 16-bit values: many programs, since BERT's norms have but 1024 columns

_BAND = 8
_HOPPER_SHARED = 200 << 10  # bytes; GPUs with less have no wgmma, and the larger tiles spill there


class Tile(NamedTuple):
    """What a program of `_fisher_linear_kernel` works on."""

    rows: int
    columns: int
    step: int  # positions at a time
    num_warps: int
    num_stages: int


def tile(
    dtype: torch.dtype, rows: int, columns: int, positions: int, aligned: bool, processors: int, shared: int
) -> Tile:
    """Choose the tile for a layer, and for a GPU with that many multiprocessors and bytes of shared memory.

    Not ``aligned`` to 16 bytes, elements are read one by one, and an address each spills from any but a small tile.

    H200, bfloat16, against the plain weight gradient: 32 x 128 x 4096 x 1024 takes 1.63 with 64 x 256 x 64 and 4
    stages (1.77 where squares are not added by fused multiply-adds), 1.71 with 128 x 128 x 128 and 3 stages, 1.76 with
    64 x 128 x 64, 2.86 with 128 x 256 x 64, which spills. 16 x 128 x 1024 x 1024 takes 2.0 with that tile, which makes
    64 programs for 132 multiprocessors, 1.21 with 64 x 64 x 128. float32 takes 1.25 to 1.35; three TF32 products
    instead of IEEE arithmetic took 1.8.
    """
    if not aligned:
        return Tile(64, 64, 16, 4, 2)
    if dtype == torch.float32:
        return Tile(64, 64, 32, 4, 3)
    hopper = shared >= _HOPPER_SHARED
    if triton.cdiv(rows, 64) * triton.cdiv(columns, 256) < processors:
        return Tile(64, 64, 128 if hopper and positions % 128 == 0 else 64, 4, 3)
    return Tile(64, 256, 64, 8, 4) if hopper else Tile(128, 128, 64, 8, 3)


def fisher_linear_(total: Tensor, d: Tensor, x: Tensor) -> None:
    """Launch `reference.fisher_linear_`; one position, or float64, is an ordinary product and left to torch."""
    examples, positions, n_rows = d.shape
    n_columns = x.shape[2]
    if positions == 1 or d.dtype == torch.float64 or 0 in d.shape or 0 in x.shape:
        reference.fisher_linear_(total, d, x)
        return
    strides = (d.stride(0), d.stride(1), x.stride(0), x.stride(1))
    aligned = not any(value % 16 for value in (*strides, d.data_ptr(), x.data_ptr()))
    size = tile(d.dtype, n_rows, n_columns, positions, aligned, *_resources(d.device))
    fits = positions % size.step == 0 and n_rows % size.rows == 0 and n_columns % size.columns == 0
    even = fits and strides[0] == positions * strides[1] and strides[2] == positions * strides[3]
    with on_device(d.device):
        _fisher_linear_kernel[(triton.cdiv(n_rows, size.rows) * triton.cdiv(n_columns, size.columns),)](
            total, d, x, examples, positions, n_rows, n_columns, *strides,
            EVEN=even, ROWS=size.rows, COLUMNS=size.columns, STEP=size.step, BAND=_BAND,
            num_warps=size.num_warps, num_stages=size.num_stages, enable_fp_fusion=True,
        )  # fmt: skip


def fisher_columns_(total: Tensor, d: Tensor, factor: Tensor | None = None, plain_total: Tensor | None = None) -> None:
    """Launch `reference.fisher_columns_`."""
    examples, positions, n_columns = d.shape
    if d.dtype == torch.float64 or 0 in d.shape:
        reference.fisher_columns_(total, d, factor, plain_total)
        return
    strides = (0, 0) if factor is None else (factor.stride(0), factor.stride(1))
    with on_device(d.device):
        _fisher_columns_kernel[(triton.cdiv(n_columns, _COLUMN_TILE),)](
            total, plain_total, d, factor, examples, positions, n_columns, d.stride(0), d.stride(1), *strides,
            ROWS=128, COLUMNS=_COLUMN_TILE, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


@functools.cache
def _resources(device: torch.device) -> tuple[int, int]:
    if INTERPRET:
        return 1, 0
    about = torch.cuda.get_device_properties(device)
    return about.multi_processor_count, about.shared_memory_per_block_optin
