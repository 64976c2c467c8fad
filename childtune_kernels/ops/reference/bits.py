"""The eager meaning of the ops on packed bits and on scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ... import philox

_CHUNK = 1 << 20  # random elements drawn at a time: bounds the int64 temporaries to a few tens of MB


def bernoulli_bits(numel: int, key: int, step: int, p: float, domain: int, offset: int, device: torch.device) -> Tensor:
    """Pack the keep-bits of elements offset .. offset + numel - 1 of one parameter."""
    chunks = [torch.empty(0, dtype=torch.int32, device=device)]
    for start in range(0, numel, _CHUNK):
        elements = torch.arange(start, min(start + _CHUNK, numel), device=device) + offset
        chunks.append(pack_bits(philox.keep_bits(elements, key, step, p, domain)))
    return torch.cat(chunks)


def score_keys(scores: Tensor) -> Tensor:
    """Return 32-bit unsigned integers, as int64, in the order of the scores: -0 and 0 are one key, NaN has none."""
    scores = scores.float()
    bits = torch.where(scores == 0, 0.0, scores).view(torch.int32).to(torch.int64)
    return torch.where(bits < 0, ~bits, bits | 0x80000000) & 0xFFFFFFFF


def score_of_key(key: int) -> float:
    """Return the score that has the key."""
    bits = key ^ (0x80000000 if key >> 31 else 0xFFFFFFFF)
    return float(np.array(bits, np.uint32).view(np.float32))


def score_histogram(scores: Sequence[Tensor], firsts: Sequence[int], shift: int, digits: int) -> Tensor:
    """Count each tensor's scores by key, int64 [n, 2**digits + 1].

    Entry d of a tensor's row counts the keys from first + d * 2**shift to first + (d + 1) * 2**shift - 1, the last
    entry the NaNs; other keys are not counted.
    """
    bins = 1 << digits
    counts = torch.zeros((len(scores), bins + 1), dtype=torch.int64, device=scores[0].device if scores else None)
    for tensor, first, row in zip(scores, firsts, counts, strict=True):
        for chunk in tensor.reshape(-1).split(_CHUNK):
            digit = (score_keys(chunk) - first) >> shift  # below first: negative
            digit = torch.where(chunk.isnan(), bins, torch.where((digit < 0) | (digit >= bins), bins + 1, digit))
            row += torch.bincount(digit, minlength=bins + 2)[: bins + 1]
    return counts


def threshold_bits(
    scores: Sequence[Tensor], thresholds: Sequence[float], tie_ends: Sequence[int], lowest: bool = False
) -> Tensor:
    """Pack the scores above their tensor's threshold, and those equal to it whose index is below its tie_end.

    ``lowest``: the scores below it. Compared in fp32, which 16-bit scores are widened to; NaN is never kept. The
    tensors' words follow each other, int32 [sum of ceil(numel / 32)].
    """
    packed = [torch.empty(0, dtype=torch.int32, device=scores[0].device if scores else None)]
    for tensor, threshold, tie_end in zip(scores, thresholds, tie_ends, strict=True):
        score = tensor.reshape(-1).float()  # 16-bit scores would round the threshold to 16 bit
        bits = score < threshold if lowest else score > threshold
        bits[:tie_end] |= score[:tie_end] == threshold
        packed.append(pack_bits(bits))
    return torch.cat(packed)


def popcount_bits(words: Tensor) -> Tensor:
    """Count the set bits, int64 []."""
    return unpack_bits(words, 32 * words.numel()).sum()


def overlap_bits(a: Tensor, b: Tensor) -> Tensor:
    """Count the set bits of ``a & b`` and of ``a | b``, int64 [2]."""
    return torch.stack((popcount_bits(a & b), popcount_bits(a | b)))


def pack_bits(bits: Tensor) -> Tensor:
    """Pack bools, in row-major order, into int32 words: bit i of word w is element 32 * w + i; spare bits are 0."""
    bits = torch.nn.functional.pad(bits.reshape(-1).to(torch.uint8), (0, -bits.numel() % 32))
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.view(-1, 8) << shifts).sum(dim=1, dtype=torch.uint8).view(torch.int32)


def unpack_bits(words: Tensor, numel: int) -> Tensor:
    """Return the first ``numel`` bits as bool [numel]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=words.device)
    return (words.view(torch.uint8)[:, None] >> shifts & 1).view(-1)[:numel].bool()
