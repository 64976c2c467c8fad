"""Batches of any make: tensors in mappings, lists and tuples, whose first dimension is the example."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from ..errors import require

_BATCHES = "batches of tensors whose first dimension is the example, as of a DataLoader with a collate function"


def require_batch(batch: Any, source: Any) -> None:
    """Refuse a single example, such as an item of a dataset, and what holds no tensors.

    Args:
        batch: the first batch.
        source: what it came from. Labels that are one number, or any number among the tensors of a dataset's item,
            are an example's.

    Raises:
        ValueError: naming what the batch holds, and that a DataLoader makes batches.
    """
    labels = [batch[key] for key in ("labels", "label") if key in batch] if isinstance(batch, Mapping) else []
    is_dataset = isinstance(source, Dataset) or hasattr(source, "column_names")  # torch's; Hugging Face's
    single = any(_is_number(part) for part in (labels + list(_parts(batch)) if is_dataset else labels))
    require("batches", _described(batch), not single and any(t.dim() for t in tensors_of(batch)), _BATCHES)


def _is_number(value: Any) -> bool:
    return not value.dim() if isinstance(value, Tensor) else isinstance(value, (int, float))


def _parts(batch: Any) -> Iterable[Any]:
    if isinstance(batch, Mapping):
        return batch.values()
    return batch if isinstance(batch, (list, tuple)) else (batch,)


def _described(value: Any) -> Any:
    """Return what a batch holds, short enough for an error."""
    if isinstance(value, Tensor):
        return f"tensor {list(value.shape)}"
    if isinstance(value, Mapping):
        return {key: _described(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} of {len(value)}: {', '.join(str(_described(part)) for part in value[:3])}"
    return type(value).__name__


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
