"""Batches of any make: tensors in mappings, lists and tuples, whose first dimension is the example."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from ..ops.checks import require


def count_examples(batch: Any) -> int:
    """Return the length that the first dimension of the batch's tensors has."""
    sizes = {t.shape[0] for t in tensors_of(batch) if t.dim()}
    require("batches", f"sizes {sorted(sizes)}", len(sizes) == 1, "batches whose tensors share their first dimension")
    return sizes.pop()


def take(batch: Any, indices: list[int], examples: int) -> Any:
    """Return some examples of a batch, in a batch of the same make."""
    return map_tensors(batch, lambda t: t[indices] if t.dim() and t.shape[0] == examples else t)


def map_tensors(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(value, function) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(value, function) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(map_tensors(value, function) for value in batch)
    return batch


def tensors_of(batch: Any) -> Iterable[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, list, tuple)):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from tensors_of(value)
