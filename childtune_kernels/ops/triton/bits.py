"""Packed bits in Triton: F's stream into int32 words, and counting them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import philox
from .launch import OPTIONS, on_device
from .philox import keep_bits

_BLOCK = 4096  # bits a program
_COUNT_BLOCK = 2048  # words a program of _overlap_kernel


@triton.jit
def store_bits(words, start, bits, numel, BLOCK: tl.constexpr):
    """Pack BLOCK bools into words start / 32 ...; bits from ``numel`` on are 0."""
    inside = start + tl.arange(0, BLOCK) < numel
    lanes = tl.arange(0, 32)[None, :]
    packed = tl.sum(tl.reshape((bits & inside).to(tl.int32), [BLOCK // 32, 32]) << lanes, axis=1)
    index = start // 32 + tl.arange(0, BLOCK // 32)
    tl.store(words + index, packed, mask=index * 32 < numel)


@triton.jit(do_not_specialize=["numel", "key", "step", "last_kept", "domain", "offset"])
def _bernoulli_bits_kernel(words, numel, key, step, last_kept, domain, offset, BLOCK: tl.constexpr):
    """grid: (ceil(numel / BLOCK),); 64-bit integers as int64, 32-bit words as their two's complement."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    bits = keep_bits(offset + start, key, step.to(tl.uint32), last_kept.to(tl.uint32), domain.to(tl.uint32), BLOCK)
    store_bits(words, start, bits, numel, BLOCK)


@triton.jit
def _count_bits(words):
    """Count the set bits of each word, int32; LLVM turns this into one popc instruction."""
    x = words.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return ((((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit(do_not_specialize=["n_words"])
def _popcount_kernel(words, count, n_words, BLOCK: tl.constexpr):
    """grid: (ceil(n_words / BLOCK),)"""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(words + offsets, mask=offsets < n_words, other=0)
    tl.atomic_add(count, tl.sum(_count_bits(x), axis=0).to(tl.int64))


@triton.jit(do_not_specialize=["n_words"])
def _overlap_kernel(a, b, counts, n_words, BLOCK: tl.constexpr):
    """grid: (ceil(n_words / BLOCK),); counts: int64 [2], zeros. Only an unmasked load is 16 bytes wide."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n_words:
        x, y = tl.load(a + offsets), tl.load(b + offsets)
    else:
        inside = offsets < n_words
        x, y = tl.load(a + offsets, mask=inside, other=0), tl.load(b + offsets, mask=inside, other=0)
    tl.atomic_add(counts, tl.sum(_count_bits(x & y), axis=0).to(tl.int64), sem="relaxed")
    tl.atomic_add(counts + 1, tl.sum(_count_bits(x | y), axis=0).to(tl.int64), sem="relaxed")


def bernoulli_bits(numel: int, key: int, step: int, p: float, domain: int, offset: int, device: torch.device) -> Tensor:
    """Launch `reference.bernoulli_bits`."""
    words = torch.empty((numel + 31) // 32, dtype=torch.int32, device=device)
    last_kept = philox.as_signed(philox.keep_threshold(p) - 1, 32)
    with on_device(words.device):
        if numel:
            _bernoulli_bits_kernel[(triton.cdiv(numel, _BLOCK),)](
                words, numel, key, philox.as_signed(step, 32), last_kept, domain, offset, BLOCK=_BLOCK, **OPTIONS
            )
    return words


def popcount_bits(words: Tensor) -> Tensor:
    """Launch `reference.popcount_bits`."""
    count = torch.zeros((), dtype=torch.int64, device=words.device)
    with on_device(words.device):
        if words.numel():
            _popcount_kernel[(triton.cdiv(words.numel(), _BLOCK),)](
                words, count, words.numel(), BLOCK=_BLOCK, **OPTIONS
            )
    return count


def overlap_bits(a: Tensor, b: Tensor) -> Tensor:
    """Launch `reference.overlap_bits`."""
    counts = torch.zeros(2, dtype=torch.int64, device=a.device)
    with on_device(a.device):
        if a.numel():
            _overlap_kernel[(triton.cdiv(a.numel(), _COUNT_BLOCK),)](
                a, b, counts, a.numel(), BLOCK=_COUNT_BLOCK, **OPTIONS
            )
    return counts
