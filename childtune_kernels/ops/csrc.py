"""The compiled ops: what ../../csrc registers on the ``.csrc`` overloads when `_C_cpu` and `_C_cuda` are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

# Products, sums, gathers: torch's own libraries are the compiled way, so csrc has no kernel of its own.
from .reference import fisher_columns_ as fisher_columns_
from .reference import fisher_linear_ as fisher_linear_
from .reference import gather_child_ as gather_child_
from .update import Update

NAME = "csrc"
DIGITS = 11  # bits of a key that `score_histogram` counts at its best, in shared memory or cache
_OPS = torch.ops.childtune
_PACKAGE = Path(__file__).resolve().parent.parent
_loaded: dict[str, str | None] = {}  # device type -> why it is not served, None where it is


def load() -> None:
    """Load what was built for this torch. The op schemas must be defined before."""
    for device_type in ("cpu", "cuda"):
        _loaded[device_type] = _load(device_type)


def unavailable(device_type: str) -> str | None:
    """Return why compiled kernels cannot serve a device type, or None where they can."""
    return _loaded.get(device_type, "csrc serves CPU and CUDA tensors")


def _load(device_type: str) -> str | None:
    if device_type == "cuda" and torch.version.cuda is None:
        return "this torch is built without CUDA"
    paths = sorted(_PACKAGE.glob(f"_C_{device_type}*.so"))
    if not paths:
        return (
            f"the {device_type} part of csrc is not built; `pip install --no-build-isolation .` builds it where "
            f"{'nvcc' if device_type == 'cuda' else 'a C++ compiler'} is installed"
        )
    try:
        torch.ops.load_library(paths[0])
    except OSError as error:  # built against another CUDA or an older torch
        return f"{paths[0].name} cannot be loaded ({error})"
    return None


def update_(update: Update) -> None:
    """Run `reference.update_`, compiled: a boxed op, one a rule, takes the lists one by one."""
    if len(update):
        getattr(_OPS, f"{update.rule.file}_").csrc(
            update.params,
            update.grads,
            update.exp_avgs,
            update.exp_avg_sqs,
            update.steps,
            update.hyper,
            update.indices,
            update.mask_words,
            update.mask_keys,
            update.companions,
            update.rounding_keys,
            update.lrs,
            *update.scaling,
        )


def square_accumulate_(accumulators: Sequence[Tensor], grads: Sequence[Tensor], scale: float) -> None:
    """Run `reference.square_accumulate_`, compiled."""
    _OPS.square_accumulate_.csrc(accumulators, grads, scale)


def bernoulli_bits(numel: int, key: int, step: int, p: float, domain: int, offset: int, device: torch.device) -> Tensor:
    """Run `reference.bernoulli_bits`, compiled: on the device of the words that it fills."""
    words = torch.empty((numel + 31) // 32, dtype=torch.int32, device=device)
    _OPS.bernoulli_bits.csrc(words, numel, key, step, p, domain, offset)
    return words


def score_histogram(scores: Sequence[Tensor], firsts: Sequence[int], shift: int, digits: int) -> Tensor:
    """Run `reference.score_histogram`, compiled."""
    return _OPS.score_histogram.csrc(scores, firsts, shift, digits)


def threshold_bits(
    scores: Sequence[Tensor], thresholds: Sequence[float], tie_ends: Sequence[int], lowest: bool = False
) -> Tensor:
    """Run `reference.threshold_bits`, compiled."""
    return _OPS.threshold_bits.csrc(scores, thresholds, tie_ends, lowest)


def popcount_bits(words: Tensor) -> Tensor:
    """Run `reference.popcount_bits`, compiled."""
    return _OPS.popcount_bits.csrc(words)


def overlap_bits(a: Tensor, b: Tensor) -> Tensor:
    """Run `reference.overlap_bits`, compiled."""
    return _OPS.overlap_bits.csrc(a, b)
