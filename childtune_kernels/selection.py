"""Exactly k weights: the highest or lowest scores of a whole list of tensors, or a random draw, as packed bits.

The scores stay where they are. A score's key is a 32-bit integer in the order of the scores; the k-th key is found
digit by digit from histograms of all tensors (a radix select), so that a selection reads every score once a digit and
once more to pack the bits. No concatenation, no sort, 64-bit counts; the histograms take 16 KB a tensor at most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from . import ops, philox
from .ops import checks
from .ops.tensors import TensorList

_KEY_BITS = 32  # as many as a word of the mask stream
_PIECES = 256  # parts of a tensor that are counted in one launch on the way to its last included tie


@torch.no_grad()
def select_words(
    scores: Mapping[str, Tensor], p: float, *, lowest: bool = False, per_tensor: bool = False, impl: str = "auto"
) -> dict[str, Tensor]:
    """Select the share ``p`` of the weights that has the highest scores (paper, sec. 2.3).

    Exactly ``k = round(p * N)`` of N weights, by Python's round (halves to even). Among equal scores the first are
    taken, in the mapping's order and then by row-major index. -0 equals 0.

    Args:
        scores: name -> float32, bfloat16 or float16 tensor of any shape, on any device; one that is not contiguous
            is copied.
        p: share of the weights, in (0, 1].
        lowest: take the lowest scores instead (sec. 4.3, "Lowest Info.").
        per_tensor: take the share of each tensor by itself instead of all together.
        impl: "triton", "csrc" or "reference" instead of the fastest on each device.

    Returns:
        name -> mask words, int32 [ceil(numel / 32)], on the tensor's device.

    Raises:
        ValueError: there are no scores, ``p`` is out of range, or a score is NaN.
        TypeError: a score has another dtype, or is no ordinary dense tensor.
        RuntimeError: a named ``impl`` cannot serve a device.
    """
    _check_share(p)
    return dict(zip(scores, _select_words(_Scores(scores, impl), p, lowest, per_tensor), strict=True))


def random_words(
    shapes: Mapping[str, tuple[int, ...]],
    p: float,
    seed: int,
    *,
    device: torch.device | str = "cpu",
    per_tensor: bool = False,
    impl: str = "auto",
) -> dict[str, Tensor]:
    """Draw a random child network of exactly ``k = round(p * N)`` of N weights (sec. 4.3, "Random").

    The child is the k lowest words of the mask stream, in its domain of random children, at step 1; among equal words
    the first are taken, in the mapping's order and then by row-major index. So it depends on the seed, the names and
    their shapes alone. The words are drawn again for each look at how many are below a limit, about seven, and never
    held: a tensor's bits at a time are the memory it takes beside the result.

    Args:
        shapes: name -> parameter shape.
        p: share of the weights, in (0, 1].
        seed: in [0, 2**64).
        device: where the bits are made.
        per_tensor: draw the share of each tensor by itself instead of all together.
        impl: "triton", "csrc" or "reference" instead of the fastest on the device.

    Returns:
        name -> mask words, int32 [ceil(numel / 32)].

    Raises:
        ValueError: there are no shapes, or ``p`` or ``seed`` is out of range.
        RuntimeError: a named ``impl`` cannot serve the device.
    """
    _check_share(p)
    if not shapes:
        raise ValueError("shapes must name at least one tensor, got none")
    device = torch.device(device)
    kernels = ops.implementation(impl, device.type)
    numels = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    stream_keys = {name: philox.stream_key(seed, name) for name in shapes}

    def draw(name: str, limit: int) -> Tensor:
        """Pack which of a tensor's words are below the limit."""
        if limit == 0:
            return torch.zeros((numels[name] + 31) // 32, dtype=torch.int32, device=device)
        share = limit / 2**_KEY_BITS
        return kernels.bernoulli_bits(numels[name], stream_keys[name], 1, share, philox.RANDOM_CHILD, 0, device)

    words = {}
    for names in [[name] for name in shapes] if per_tensor else [list(shapes)]:
        total = sum(numels[name] for name in names)
        wanted = round(p * total)
        limit, count = _find_limit(
            lambda limit, names=names: int(sum(kernels.popcount_bits(draw(name, limit)) for name in names)),
            total,
            wanted,
        )
        words.update((name, draw(name, limit)) for name in names)
        for name in reversed(names):  # several words are limit - 1: the last of them are too many
            if count > wanted:
                count -= _drop_last(words[name], words[name] ^ draw(name, limit - 1), count - wanted)
    return words


class _Scores:
    """The tensors of a selection, by device: what the ops say of them, in the mapping's order."""

    def __init__(self, scores: Mapping[str, Tensor], impl: str):
        if not scores:
            raise ValueError("scores must name at least one tensor, got none")
        self.names = list(scores)
        self.tensors = []
        for name, tensor in scores.items():
            checks.check_parameter(f"scores[{name!r}]", tensor)
            if tensor.layout != torch.strided:
                raise TypeError(f"scores[{name!r}] must be dense, got layout {tensor.layout}")
            self.tensors.append(tensor.contiguous())
        self.numels = np.array([tensor.numel() for tensor in self.tensors], np.int64)
        places = [tensor.device for tensor in self.tensors]
        self.parts = []  # of each device: implementation, positions, tensors
        for device in dict.fromkeys(places):
            rows = np.array([i for i, place in enumerate(places) if place == device])
            # csrc takes 3 histograms where Triton takes 8: 335 M scores in 3.0 ms instead of 7.2, H200
            compiled = impl == "auto" and ops.unavailable("csrc", device.type) is None
            kernels = ops.implementation("csrc" if compiled else impl, device.type)
            self.parts.append((kernels, rows, TensorList(self.tensors[i] for i in rows)))
        self.digits = min(kernels.DIGITS for kernels, _, _ in self.parts)

    def histogram(self, firsts: np.ndarray, shift: int, digits: int, *, together: bool = False) -> np.ndarray:
        """Return `score_histogram`'s counts of each tensor, or of all tensors together, int64 [n or 1, bins + 1]."""
        counts = np.zeros((1 if together else len(self.tensors), 2**digits + 1), np.int64)
        found = []
        for kernels, rows, tensors in self.parts:  # every device has its work before one is waited for
            result = kernels.score_histogram(tensors, firsts[rows].tolist(), shift, digits)
            found.append(result.sum(0, keepdim=True) if together else result)
        for (_, rows, _), result in zip(self.parts, found, strict=True):
            counts[0 if together else rows] += result.cpu().numpy().squeeze(0) if together else result.cpu().numpy()
        return counts

    def threshold_bits(self, thresholds: list[float], tie_ends: list[int], lowest: bool) -> list[Tensor]:
        """Return each tensor's packed bits."""
        words: list = [None] * len(self.tensors)
        for kernels, rows, tensors in self.parts:
            packed = kernels.threshold_bits(tensors, [thresholds[i] for i in rows], [tie_ends[i] for i in rows], lowest)
            for i, own in zip(rows, packed.split(((self.numels[rows] + 31) // 32).tolist()), strict=True):
                words[i] = own
        return words

    def refuse_nans(self) -> None:
        counts = self.histogram(np.zeros(len(self.tensors), np.int64), 0, 0)[:, -1]
        i = int(counts.argmax())
        raise ValueError(f"scores[{self.names[i]!r}] must not be NaN, got {counts[i]} of {self.numels[i]}")


def _select_words(lists: _Scores, p: float, lowest: bool, per_tensor: bool) -> list[Tensor]:
    """Return each tensor's packed bits of `select`."""
    n = len(lists.tensors)
    group = np.arange(n) if per_tensor else np.zeros(n, np.int64)  # of each tensor
    totals = lists.numels if per_tensor else lists.numels.sum(keepdims=True)
    wanted = np.array([round(p * total) for total in totals.tolist()])
    keys, taken_ties, ties = _find_keys(lists, group, wanted, lowest)
    tie_ends = lists.numels.copy()
    if (taken_ties < ties).any():
        counts = lists.histogram(keys[group], 0, 0)[:, 0]
        for i, g in enumerate(group):
            if counts[i] > taken_ties[g]:
                tie_ends[i] = _find_tie_end(lists, i, int(keys[g]), int(taken_ties[g]))
            taken_ties[g] -= min(counts[i], taken_ties[g])
    thresholds = [ops.score_of_key(key) for key in keys.tolist()]
    return lists.threshold_bits([thresholds[g] for g in group], tie_ends.tolist(), lowest)


def _find_keys(
    lists: _Scores, group: np.ndarray, wanted: np.ndarray, lowest: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the key of the last wanted score of each group, digit by digit.

    Where none is wanted it is a key beyond all scores, a NaN's, which nothing equals or exceeds.

    Returns:
        The keys, how many scores of that key are wanted, and how many there are; int64 [groups] each.

    Raises:
        ValueError: a score is NaN.
    """
    keys, known = np.zeros(len(wanted), np.int64), 0
    rows = np.arange(len(wanted))
    while known < _KEY_BITS:
        digits = min(lists.digits, _KEY_BITS - known)
        known += digits
        shift = _KEY_BITS - known
        counts = lists.histogram(keys[group], shift, digits, together=len(wanted) < len(group))
        if counts[:, -1].any():
            lists.refuse_nans()
        counts = counts[:, :-1] if lowest else counts[:, -2::-1]  # the best first
        reached = counts.cumsum(axis=1)
        best = (reached < wanted[:, None]).sum(axis=1)
        ties = counts[rows, best]
        wanted = wanted - (reached[rows, best] - ties)
        keys = keys + ((best if lowest else 2**digits - 1 - best) << shift)
    return keys, wanted, ties


def _find_tie_end(lists: _Scores, i: int, key: int, wanted: int) -> int:
    """Return the length of the shortest head of a tensor that has ``wanted`` scores of the key."""
    kernels = next(kernels for kernels, rows, _ in lists.parts if i in rows)
    scores = lists.tensors[i].view(-1)
    start, stop = 0, scores.numel() if wanted else 0
    while stop - start > 1:
        pieces = scores[start:stop].split(-(-(stop - start) // _PIECES))
        counts = kernels.score_histogram(pieces, [key] * len(pieces), 0, 0)[:, 0].tolist()
        piece = 0
        while counts[piece] < wanted:
            wanted -= counts[piece]
            start += pieces[piece].numel()
            piece += 1
        stop = start + pieces[piece].numel()
    return stop


def _find_limit(count_below: Callable[[int], int], total: int, wanted: int) -> tuple[int, int]:
    """Return the smallest limit with ``wanted`` random words or more below it, or any with exactly as many; the count.

    The words are spread evenly, so interpolation leaves the square root of a miss at each look.
    """
    low, below_low = 0, 0
    high, below_high = 2**_KEY_BITS, total
    while below_high != wanted and high - low > 1:
        guess = low + (wanted - below_low) * (high - low) // (below_high - below_low)
        guess = min(max(guess, low + 1), high - 1)
        count = count_below(guess)
        if count < wanted:
            low, below_low = guess, count
        else:
            high, below_high = guess, count
    return high, below_high


def _drop_last(words: Tensor, bits: Tensor, limit: int) -> int:
    """Clear the last ``limit`` of the given bits, all set in ``words``; return how many there were to clear."""
    index = bits.nonzero().view(-1)
    own = ops.unpack_bits(bits[index], 32 * index.numel()).view(-1, 32).nonzero()[-limit:]
    words.index_add_(0, index[own[:, 0]], -(1 << own[:, 1]).to(torch.int32))
    return len(own)


def _check_share(p: float) -> None:
    if not 0 < p <= 1:
        raise ValueError(f"p must be in (0, 1], got {p}")
