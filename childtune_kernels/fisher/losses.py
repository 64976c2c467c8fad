"""Per-example losses -log p(y | x) for the usual heads of Hugging Face models.

Each takes (model, batch, labels="true") and returns [B], at least float32. A batch is a mapping that holds ``labels``
beside the model's inputs. ``labels="sampled"`` draws them from the model (the true Fisher information, not the
empirical one of Eq. 10), ``"predicted"`` takes the likeliest. Where a label is -100 there is no loss in any case.

Labels of a wrong shape or dtype raise ValueError, and so do those out of range, if they come on the CPU. On a GPU,
where to read them is to wait for it, labels out of range make their example's loss NaN.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import require
from .rules import wide

LABELS = ("true", "sampled", "predicted")
IGNORED = -100  # the label of positions that no loss is taken of, as in transformers


def classification_loss(model: nn.Module, batch: Mapping[str, Any], labels: str = "true") -> Tensor:
    """Return the cross entropy of logits [B, classes] and labels [B]."""
    inputs, given = _split(model, batch, labels)
    logits = wide(model(**inputs).logits)
    require("logits", list(logits.shape), logits.dim() == 2, "[B, classes]")
    return _cross_entropy(logits, given, labels, batch["labels"])


def regression_loss(model: nn.Module, batch: Mapping[str, Any], labels: str = "true") -> Tensor:
    """Return (y - prediction)**2 / 2: -log p of a normal distribution of variance 1, up to a constant.

    Raises:
        ValueError: ``labels="predicted"``, of which every gradient is 0; not one prediction and one label an example.
    """
    inputs, given = _split(model, batch, labels)
    logits = wide(model(**inputs).logits)
    require("logits", list(logits.shape), logits.numel() == len(logits), "[B] or [B, 1]: one prediction an example")
    predicted = logits.flatten()
    if labels == "predicted":
        raise ValueError("labels must be 'true' or 'sampled' for a regression, got 'predicted': its gradient is 0")
    if labels == "sampled":
        return (predicted - _normal(predicted.detach())).square() / 2
    examples = len(predicted)
    require("labels", list(given.shape), list(given.shape) in ([examples], [examples, 1]), f"[{examples}], numbers")
    return (predicted - given.to(predicted.dtype).flatten()).square() / 2


def causal_lm_loss(model: nn.Module, batch: Mapping[str, Any], labels: str = "true") -> Tensor:
    """Return each sequence's sum over tokens; the logits at a position predict the next token.

    A label counts unless it is -100, as in transformers; where the attention mask is 0 that is warned of.
    """
    inputs, given = _split(model, batch, labels)
    _warn_of_padding(batch, first=1)
    logits = wide(model(**inputs).logits)
    require("logits", list(logits.shape), logits.dim() == 3, "[B, T, vocabulary]")
    _require_shape(given, logits)
    return _cross_entropy(logits[:, :-1], given[:, 1:], labels, batch["labels"][:, 1:]).sum(1)


def token_loss(model: nn.Module, batch: Mapping[str, Any], labels: str = "true") -> Tensor:
    """Return each sequence's sum over tokens; logits predict their own position (masked LM, T5, tagging).

    Labels count as in `causal_lm_loss`.
    """
    inputs, given = _split(model, batch, labels)
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["labels"] = given  # from which the decoder's inputs are made
    else:
        _warn_of_padding(batch, first=0)
    logits = wide(model(**inputs).logits)
    require("logits", list(logits.shape), logits.dim() == 3, "[B, T, classes]")
    return _cross_entropy(logits, given, labels, batch["labels"]).sum(1)


def _cross_entropy(logits: Tensor, given: Tensor, labels: str, source: Tensor) -> Tensor:
    """Return -log p of each label, [...]: 0 where it is -100, NaN where it is no class.

    Args:
        logits: [..., classes].
        given: [...], integers, where the logits are.
        labels: as of the losses.
        source: the same labels as they came, to be looked at without waiting for a device.
    """
    classes = logits.shape[-1]
    _require_shape(given, logits)
    whole = not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
    require("labels", str(given.dtype), whole, "integers, the numbers of classes")
    given = given.long()  # before it is compared: -100 as uint8 is 156
    if labels == "true" and source.device.type == "cpu":
        wrong = source[_no_class(source.long(), classes)]
        require("labels", wrong[:10].tolist(), not len(wrong), f"from 0 to {classes - 1}, or {IGNORED} for no label")
    ignored = given == IGNORED
    chosen = _choose(logits, given, labels)
    wrong = _no_class(chosen, classes) & ~ignored
    chosen = chosen.masked_fill(ignored | wrong, IGNORED)
    losses = F.cross_entropy(logits.movedim(-1, 1), chosen, reduction="none", ignore_index=IGNORED)
    return losses.masked_fill(wrong, torch.nan)


def _no_class(labels: Tensor, classes: int) -> Tensor:
    return (labels != IGNORED) & ((labels < 0) | (labels >= classes))


def _require_shape(given: Tensor, logits: Tensor) -> None:
    require("labels", list(given.shape), given.shape == logits.shape[:-1], f"{list(logits.shape[:-1])}, as the logits")


def _warn_of_padding(batch: Mapping[str, Any], first: int) -> None:
    """Warn of padding whose labels, from a position on, count, where that is seen without waiting for a device."""
    labels, attention = batch["labels"], batch.get("attention_mask")
    if not isinstance(attention, Tensor) or attention.dim() != 2 or attention.shape != labels.shape:
        return
    if labels.is_cpu and attention.is_cpu and ((attention == 0) & (labels != IGNORED))[:, first:].any():
        text = f"labels count where the attention mask is 0: set the labels of padding to {IGNORED}"
        warnings.warn(text, stacklevel=3)


def _split(model: nn.Module, batch: Mapping[str, Any], labels: str) -> tuple[dict[str, Any], Tensor]:
    require("labels", labels, labels in LABELS, f"one of {LABELS}")
    if not isinstance(batch, Mapping) or "labels" not in batch:
        raise ValueError(f"batch must be a mapping that holds 'labels', got {type(batch).__name__}")
    require("labels", type(batch["labels"]).__name__, isinstance(batch["labels"], Tensor), "a tensor")
    device = next(model.parameters()).device
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return {k: v for k, v in moved.items() if k != "labels"}, moved["labels"]


def _choose(logits: Tensor, given: Tensor, labels: str) -> Tensor:
    if labels == "true":
        return given
    if labels == "predicted":
        return logits.argmax(-1)
    flat = logits.detach().softmax(-1).flatten(0, -2)
    return torch.multinomial(flat, 1).view(logits.shape[:-1])


def _normal(mean: Tensor) -> Tensor:
    return mean + torch.randn_like(mean)
