"""What every op demands of its arguments; errors name the argument, the expected and the received value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_DIGITS = 11  # bits of a key that one score_histogram tells apart: 2048 counts fit any shared memory


def check_gradient(label: str, grad: Tensor, param: Tensor) -> None:
    """Refuse a gradient that does not mirror its parameter.

    Raises:
        RuntimeError: sparse or complex gradient, or one of another dtype, device or shape.
    """
    if grad.layout != torch.strided:
        raise RuntimeError(f"gradient of {label} must be dense, got layout {grad.layout}")
    for what in ("dtype", "device", "shape"):
        expected, got = getattr(param, what), getattr(grad, what)
        if expected != got:
            raise RuntimeError(f"gradient of {label} must have {what} {_plain(expected)}, got {_plain(got)}")


def check_parameter(label: str, param: Tensor) -> None:
    """Refuse a parameter that no kernel serves.

    Raises:
        TypeError: its dtype is not float32, bfloat16 or float16, or it is a DTensor or a shard of FSDP1.
        RuntimeError: several of its elements lie in one place, as those of an expanded tensor.
    """
    if param.dtype not in WEIGHT_DTYPES:
        raise TypeError(f"{label} must have dtype float32, bfloat16 or float16, got {param.dtype}")
    if type(param).__name__ == "DTensor":
        raise TypeError(f"{label} must be an ordinary tensor, got a DTensor: sharded parameters are not supported yet")
    if getattr(param, "_fsdp_flattened", False) or getattr(param, "_is_flat_param", False):
        raise TypeError(
            f"{label} must be an ordinary tensor, got a shard of FullyShardedDataParallel, where masks would begin at "
            "element 0 on every rank: sharded parameters are not supported yet"
        )
    span = 0  # of the dimensions with smaller strides
    own = param.numel() and param.layout == torch.strided
    for stride, size in sorted(zip(param.stride(), param.shape, strict=True)) if own else ():
        if size > 1 and stride <= span:
            raise RuntimeError(f"{label} must have a place for every element, got strides {param.stride()}")
        span += stride * (size - 1)


def check_table(label: str, table: Tensor, rows: int, columns: int) -> None:
    """Refuse a table of hyper-parameters of another form."""
    if (table.dtype, table.shape, table.device.type) != (torch.float64, (rows, columns), "cpu"):
        raise RuntimeError(
            f"{label} must be a float64 CPU tensor of {rows} rows and {columns} columns, "
            f"got {table.dtype} {tuple(table.shape)} on {table.device}"
        )
    if not table.is_contiguous():
        raise RuntimeError(f"{label} must be contiguous, got strides {table.stride()}")


def check_state(
    label: str, param: Tensor, step: Tensor, moments: Mapping[str, Tensor], shape: tuple[int, ...] | None = None
) -> None:
    """Refuse optimizer state that does not fit its parameter.

    Args:
        moments: by name; of one dtype.
        shape: of the moments, by default the parameter's.
    """
    check_scalar(f"{label}: step", step, param.device, torch.float64)
    dtypes = WEIGHT_DTYPES
    for name, moment in moments.items():
        _check_like(f"{label}: {name}", moment, param, dtypes, shape)
        dtypes = (moment.dtype,)


def check_indices(label: str, index: Tensor, param: Tensor, exp_avg: Tensor) -> tuple[int, ...]:
    """Refuse indices that no child of the parameter can have; return the shape that its moments must have.

    That they ascend and lie inside the parameter is their maker's word: looking would wait for the device.
    """
    if index.dtype != torch.int32 or index.dim() != 1 or index.device != param.device or not index.is_contiguous():
        raise RuntimeError(
            f"{label} must be contiguous 1-D int32 on {param.device}, "
            f"got {index.dim()}-D {index.dtype} on {index.device}, strides {index.stride()}"
        )
    if index.numel() > param.numel() or param.numel() >= 2**31:
        raise RuntimeError(f"{label} must index at most {min(param.numel(), 2**31 - 1)} elements, got {index.numel()}")
    whole = index.numel() == 0 and exp_avg.numel() != 0
    return tuple(param.shape) if whole else (index.numel(),)


def check_companion(label: str, companion: Tensor, param: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse what is neither master nor compensation of a 16-bit weight; no entries mean that there is none."""
    if companion.numel():
        dtypes = () if param.dtype == torch.float32 else (torch.float32, param.dtype)
        _check_like(label, companion, param, dtypes, shape)


def check_packed_gradient(label: str, grad: Tensor, param: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a gradient that is neither the parameter's nor its child's."""
    if param.shape in (grad.shape, shape):
        check_gradient(label, grad, param)
    else:
        _check_like(f"gradient of {label}", grad, param, (param.dtype,), shape)


def check_words(label: str, words: Tensor, param: Tensor) -> None:
    """Refuse mask words that do not fit a parameter (no words at all mean: all of it)."""
    expected = (param.numel() + 31) // 32
    if words.dtype != torch.int32 or words.dim() != 1 or words.device != param.device:
        raise RuntimeError(
            f"{label} must be 1-D int32 on {param.device}, got {words.dim()}-D {words.dtype} on {words.device}"
        )
    if words.numel() not in (0, expected) or not words.is_contiguous():
        raise RuntimeError(f"{label} must hold {expected} contiguous words, got {words.numel()}")


def check_accumulate(accumulators: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Check `square_accumulate_`'s lists before anything is written."""
    if len(accumulators) != len(grads):
        raise RuntimeError(f"grads must have {len(accumulators)} entries, got {len(grads)}")
    for i, (accumulator, grad) in enumerate(zip(accumulators, grads, strict=True)):
        if grad.dtype not in WEIGHT_DTYPES or grad.layout != torch.strided or not grad.is_contiguous():
            raise RuntimeError(
                f"grads[{i}] must be a contiguous float32, bfloat16 or float16 tensor, got {grad.dtype}, {grad.layout}"
            )
        _check_like(f"accumulators[{i}]", accumulator, grad, (torch.float32,))
        if grad.device != grads[0].device:
            raise RuntimeError(f"grads[{i}] must have the list's device {grads[0].device}, got {grad.device}")


def check_gather(packed: Sequence[Tensor], grads: Sequence[Tensor], indices: Sequence[Tensor]) -> None:
    """Check `gather_child_`'s lists before anything is written."""
    for name, values in (("grads", grads), ("indices", indices)):
        if len(values) != len(packed):
            raise RuntimeError(f"{name} must have {len(packed)} entries, got {len(values)}")
    for i, (target, grad, index) in enumerate(zip(packed, grads, indices, strict=True)):
        check_indices(f"indices[{i}]", index, grad, index)
        _check_like(f"packed[{i}]", target, grad, (grad.dtype,), (index.numel(),))
        _check_like(f"grads[{i}]", grad, grad, WEIGHT_DTYPES)
        if grad.device != grads[0].device:
            raise RuntimeError(f"grads[{i}] must have the list's device {grads[0].device}, got {grad.device}")


def check_fisher(
    total: Tensor, d: Tensor, other: Tensor | None, second_total: Tensor | None, shape: tuple[int, ...]
) -> None:
    """Check the arguments of `fisher_linear_` and `fisher_columns_` before anything is written."""
    if d.dim() != 3 or (other is not None and (other.dim() != 3 or other.shape[:2] != d.shape[:2])):
        got = f"{tuple(d.shape)} and {None if other is None else tuple(other.shape)}"
        raise RuntimeError(f"d and x or factor must have shapes [B, T, O] and [B, T, ...], got {got}")
    if d.dtype not in (*WEIGHT_DTYPES, torch.float64):
        raise RuntimeError(f"d must be of a floating dtype, got {d.dtype}")
    if other is not None and len(shape) == 2 and other.dtype != d.dtype:
        raise RuntimeError(f"x must have d's dtype {d.dtype}, got {other.dtype}")
    for name, tensor in (("d", d), ("x or factor", other)):
        if tensor is not None and tensor.shape[2] > 1 and tensor.stride(2) != 1:
            raise RuntimeError(f"{name} must be contiguous in its last dimension, got strides {tensor.stride()}")
    expected = torch.float64 if d.dtype == torch.float64 else torch.float32
    for name, tensor, own in (("total", total, shape), ("second total", second_total, shape[:1])):
        if tensor is None:
            continue
        if tensor.dtype != expected or tensor.shape != own or not tensor.is_contiguous() or tensor.device != d.device:
            raise RuntimeError(
                f"{name} must be a contiguous {expected} tensor of shape {own} on {d.device}, "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
            )


def check_stream(numel: int, step: int, p: float, domain: int, offset: int) -> None:
    """Check `bernoulli_bits`' arguments."""
    if numel < 0 or offset < 0 or offset % 4:
        raise ValueError(f"numel and offset must be at least 0 and offset a multiple of 4, got {numel} and {offset}")
    if not 1 <= step < 2**32:
        raise ValueError(f"step must be in [1, 2**32), got {step}")
    if not 0 <= domain < 2**32:
        raise ValueError(f"domain must be in [0, 2**32), got {domain}")
    check_probability("p", p)


def check_probability(label: str, p: float) -> None:
    """Refuse a probability that F's 32-bit threshold cannot express."""
    if not 2**-32 <= p <= 1:
        raise ValueError(f"{label} must be in [2**-32, 1], got {p}")


def check_histogram(scores: Sequence[Tensor], firsts: Sequence[int], shift: int, digits: int) -> None:
    """Check `score_histogram`'s arguments."""
    _check_scores(scores, "firsts", firsts)
    if not (0 <= digits <= MAX_DIGITS and 0 <= shift < 32 and shift + digits <= 32):
        raise ValueError(
            f"digits must be in [0, {MAX_DIGITS}], shift in [0, 32) and their sum at most 32, got {digits} and {shift}"
        )
    for i, first in enumerate(firsts):
        if not 0 <= first <= 2**32 - 2 ** (shift + digits):
            raise ValueError(f"firsts[{i}] must be in [0, 2**32 - 2**{shift + digits}], got {first}")


def check_thresholds(scores: Sequence[Tensor], thresholds: Sequence[float], tie_ends: Sequence[int]) -> None:
    """Check `threshold_bits`' arguments."""
    _check_scores(scores, "thresholds", thresholds)
    _check_scores(scores, "tie_ends", tie_ends)
    for i, tie_end in enumerate(tie_ends):
        if tie_end < 0:
            raise ValueError(f"tie_ends[{i}] must be at least 0, got {tie_end}")


def _check_scores(scores: Sequence[Tensor], name: str, values: Sequence) -> None:
    if len(values) != len(scores):
        raise RuntimeError(f"{name} must have {len(scores)} entries, one a tensor, got {len(values)}")
    for i, tensor in enumerate(scores):
        if tensor.dtype not in WEIGHT_DTYPES or tensor.layout != torch.strided or not tensor.is_contiguous():
            raise RuntimeError(
                f"scores[{i}] must be a contiguous float32, bfloat16 or float16 tensor, got {tensor.dtype}, "
                f"{f'strides {tensor.stride()}' if tensor.layout == torch.strided else tensor.layout}"
            )
        if tensor.device != scores[0].device:
            raise RuntimeError(f"scores[{i}] must have the list's device {scores[0].device}, got {tensor.device}")


def check_packed(label: str, words: Tensor) -> None:
    """Check packed bits of any number."""
    if words.dtype != torch.int32 or not words.is_contiguous():
        raise RuntimeError(f"{label} must be contiguous int32, got {words.dtype} of strides {words.stride()}")


def check_overlap(a: Tensor, b: Tensor) -> None:
    """Check `overlap_bits`' words."""
    check_packed("a", a)
    check_packed("b", b)
    if a.shape != b.shape or a.device != b.device:
        raise RuntimeError(
            f"b must have a's shape {tuple(a.shape)} and device {a.device}, got {tuple(b.shape)} and {b.device}"
        )


def _check_like(
    label: str, value: Tensor, param: Tensor, dtypes: Sequence[torch.dtype], shape: tuple[int, ...] | None = None
) -> None:
    shape = tuple(param.shape if shape is None else shape)
    if value.shape != shape or value.device != param.device or value.dtype not in dtypes:
        raise RuntimeError(
            f"{label} must have shape {shape}, device {param.device} and dtype in "
            f"{[str(d) for d in dtypes]}, got {tuple(value.shape)}, {value.device}, {value.dtype}"
        )
    if not value.is_contiguous():
        raise RuntimeError(f"{label} must be contiguous, got strides {value.stride()}")


def check_scalar(label: str, value: Tensor, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
    """Refuse what is not one number of a dtype on a device."""
    if value.dtype != dtype or value.numel() != 1 or value.device != device:
        expected = str(dtype).removeprefix("torch.")
        raise RuntimeError(
            f"{label} must be one {expected} on {device}, got {value.numel()} x {value.dtype} on {value.device}"
        )


def _plain(value):
    return tuple(value) if isinstance(value, torch.Size) else value
