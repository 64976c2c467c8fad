"""The child network by score in Triton: histograms of the scores' keys, and the bits beyond a threshold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tensors import TensorList
from .bits import store_bits
from .launch import (
    INTERPRET,
    OPTIONS,
    TRITON_DTYPES,
    Launch,
    is_aligned,
    locate,
    map_blocks,
    on_device,
    over,
    pointer,
)
from .rounding import widened

_SCORES, _NUMEL, _ROW, _FIRST = map(tl.constexpr, range(4))  # fields of _count_kernel's table
_WORDS, _THRESHOLD, _TIE_END = map(tl.constexpr, range(2, 5))  # of _bits_kernel's, after the same two
_LANES = 1024  # scores a program loads at a time
# How often it does: up to 255 fit the 8-bit counts of a lane, and 65535 scores the 16-bit sums. Interpreted, a step
# takes 5 ms, however few of its scores there are.
_STEPS = 2 if INTERPRET else 16
_BLOCK = 4096  # bits a program
_BINS = tl.constexpr(16)  # that a program counts; wider digits take several programs a block


@triton.jit
def _score_keys(score):
    """reference.score_keys, uint32."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True)


@triton.jit
def _count_block(
    field,
    n,
    start,
    numel,
    base,
    shift,
    DTYPE: tl.constexpr,
    WHOLE: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Count the keys of bins base .. base + 15, int64 [16], and the NaNs; WHOLE: full and aligned.

    A lane's counts are bytes of two words, one addition a score: 16 comparisons and additions take the time of 5 bytes
    a clock, more than memory does.
    """
    first = tl.load(field + _FIRST * n).to(tl.uint32)
    scores = pointer(tl.load(field + _SCORES * n), DTYPE, WHOLE) + start
    low = tl.zeros([LANES], tl.int64)
    high = tl.zeros([LANES], tl.int64)
    nans = tl.zeros([LANES], tl.int32)
    for step in range(STEPS):
        offsets = step * LANES + tl.arange(0, LANES)
        if WHOLE:
            score = widened(tl.load(scores + offsets))
            counted = score == score
            nans += (score != score).to(tl.int32)
        else:
            inside = offsets < numel - start
            score = widened(tl.load(scores + offsets, mask=inside, other=0.0))
            counted = inside & (score == score)
            nans += (score != score).to(tl.int32)
        digit = ((_score_keys(score) - first) >> shift) - base  # others wrap around, or are too large
        one = tl.full([LANES], 1, tl.int64) << ((digit & 7) * 8).to(tl.int64)
        low += tl.where(counted & (digit < 8), one, 0)
        high += tl.where(counted & (digit >> 3 == 1), one, 0)
    bins = tl.arange(0, _BINS)
    even: tl.constexpr = 0x00FF00FF00FF00FF
    low_even, low_odd = tl.sum(low & even, axis=0), tl.sum((low >> 8) & even, axis=0)
    high_even, high_odd = tl.sum(high & even, axis=0), tl.sum((high >> 8) & even, axis=0)
    sums = tl.where(bins < 8, tl.where(bins % 2 == 0, low_even, low_odd), tl.where(bins % 2 == 0, high_even, high_odd))
    return (sums >> (bins % 8 // 2 * 16).to(tl.int64)) & 0xFFFF, tl.sum(nans, axis=0).to(tl.int64)


@triton.jit(do_not_specialize=["coarse_shift", "first_row", "n", "shift", "n_bins"])
def _count_kernel(
    table,
    first_block,
    coarse,
    coarse_shift,
    first_row,
    n,
    counts,
    shift,
    n_bins,
    DTYPE: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """counts: int64 [tensors, n_bins + 1], zeros.

    grid: (total blocks, ceil(n_bins / 16))
    """
    tensor, block = locate(first_block, coarse, coarse_shift)
    field = table + first_row + tensor
    start = block * (LANES * STEPS)
    numel = tl.load(field + _NUMEL * n)
    base = tl.program_id(1) * _BINS
    wide_base, wide_shift = base.to(tl.uint32), shift.to(tl.uint32)
    if is_aligned(tl.load(field + _SCORES * n), DTYPE) & (start + LANES * STEPS <= numel):
        found, nans = _count_block(field, n, start, numel, wide_base, wide_shift, DTYPE, True, LANES, STEPS)
    else:
        found, nans = _count_block(field, n, start, numel, wide_base, wide_shift, DTYPE, False, LANES, STEPS)
    row = counts + tl.load(field + _ROW * n) * (n_bins + 1)
    bins = base + tl.arange(0, _BINS)
    tl.atomic_add(row + bins, found, mask=(bins < n_bins) & (found > 0), sem="relaxed")
    if (nans > 0) & (base == 0):
        tl.atomic_add(row + n_bins, nans, sem="relaxed")


@triton.jit
def _pack_block(
    field,
    n,
    start,
    numel,
    DTYPE: tl.constexpr,
    LOWEST: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = start + tl.arange(0, BLOCK)
    threshold = tl.load(field + _THRESHOLD * n).to(tl.int32).to(tl.float32, bitcast=True)
    tie_end = tl.load(field + _TIE_END * n)
    words = pointer(tl.load(field + _WORDS * n), tl.int32, False)
    score_ptr = pointer(tl.load(field + _SCORES * n), DTYPE, WHOLE) + offsets
    if WHOLE:
        score = widened(tl.load(score_ptr))
    else:
        score = widened(tl.load(score_ptr, mask=offsets < numel, other=0.0))

    beyond = score < threshold if LOWEST else score > threshold
    store_bits(words, start, beyond | ((score == threshold) & (offsets < tie_end)), numel, BLOCK)


@triton.jit(do_not_specialize=["coarse_shift", "first_row", "n"])
def _bits_kernel(
    table,
    first_block,
    coarse,
    coarse_shift,
    first_row,
    n,
    DTYPE: tl.constexpr,
    LOWEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grid: (total blocks,)"""
    tensor, block = locate(first_block, coarse, coarse_shift)
    field = table + first_row + tensor
    start = block * BLOCK
    numel = tl.load(field + _NUMEL * n)
    if is_aligned(tl.load(field + _SCORES * n), DTYPE) & (start + BLOCK <= numel):
        _pack_block(field, n, start, numel, DTYPE, LOWEST, True, BLOCK)
    else:
        _pack_block(field, n, start, numel, DTYPE, LOWEST, False, BLOCK)


def _launches(scores: TensorList, block: int, *fields: np.ndarray) -> list[Launch]:
    """Return the launches over scores; ``fields`` follow the two that all tables start with."""
    device = scores[0].device
    blocks = map_blocks(device, block, scores.numels, tuple((dtype,) for dtype in scores.dtypes))
    return over(device, blocks, (scores.addresses, scores.sizes, *fields))[1]


def score_histogram(scores: Sequence[Tensor], firsts: Sequence[int], shift: int, digits: int) -> Tensor:
    """Launch `reference.score_histogram`."""
    scores, n_bins = TensorList.of(scores), 1 << digits
    device = scores[0].device
    counts = torch.zeros((len(scores), n_bins + 1), dtype=torch.int64, device=device)
    with on_device(device):
        rows, firsts = np.arange(len(scores)), np.array(firsts, np.int64)
        for (dtype,), n_blocks, tables in _launches(scores, _LANES * _STEPS, rows, firsts):
            _count_kernel[(n_blocks, triton.cdiv(n_bins, _BINS.value))](
                **tables,
                counts=counts,
                shift=shift,
                n_bins=n_bins,
                DTYPE=TRITON_DTYPES[dtype],
                LANES=_LANES,
                STEPS=_STEPS,
                **OPTIONS,
            )
    return counts


def threshold_bits(
    scores: Sequence[Tensor], thresholds: Sequence[float], tie_ends: Sequence[int], lowest: bool = False
) -> Tensor:
    """Launch `reference.threshold_bits`."""
    scores = TensorList.of(scores)
    device = scores[0].device
    starts = np.concatenate(([0], np.cumsum([(numel + 31) // 32 for numel in scores.numels])))
    words = torch.empty(int(starts[-1]), dtype=torch.int32, device=device)
    addresses = words.data_ptr() + 4 * starts[:-1]
    threshold_words = np.array(thresholds, np.float32).view(np.int32).astype(np.int64)
    with on_device(device):
        fields = (addresses, threshold_words, np.array(tie_ends, np.int64))
        for (dtype,), n_blocks, tables in _launches(scores, _BLOCK, *fields):
            _bits_kernel[(n_blocks,)](**tables, DTYPE=TRITON_DTYPES[dtype], LOWEST=lowest, BLOCK=_BLOCK, **OPTIONS)
    return words
