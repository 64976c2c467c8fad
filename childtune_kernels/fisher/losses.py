"""Per-example losses -log p(y | x) for the usual heads of Hugging Face models.

Each takes (model, batch, labels="true") and returns [B], at least float32. A batch is a mapping that holds ``labels``
beside the model's inputs. ``labels="sampled"`` draws them from the model (the true Fisher information, not the
empirical one of Eq. 10), ``"predicted"`` takes the likeliest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .rules import wide

LABELS = ("true", "sampled", "predicted")
IGNORED = -100  # the label of positions that no loss is taken of, as in transformers


def classification_loss(model, batch: Mapping[str, Any], labels: str = "true") -> Tensor:
    """Return the cross entropy of logits [B, classes] and labels [B]."""
    inputs, given = _split(model, batch)
    logits = wide(model(**inputs).logits)
    return F.cross_entropy(logits, _choose(logits, given, labels), reduction="none")


def regression_loss(model, batch: Mapping[str, Any], labels: str = "true") -> Tensor:
    """Return (y - prediction)**2 / 2: -log p of a normal distribution of variance 1, up to a constant.

    Raises:
        ValueError: ``labels="predicted"``, of which every gradient is 0.
    """
    inputs, given = _split(model, batch)
    predicted = wide(model(**inputs).logits).flatten()
    if labels == "predicted":
        raise ValueError("labels must be 'true' or 'sampled' for a regression, got 'predicted': its gradient is 0")
    target = given.to(predicted.dtype).flatten() if labels == "true" else _normal(predicted.detach())
    return (predicted - target).square() / 2


def causal_lm_loss(model, batch: Mapping[str, Any], labels: str = "true") -> Tensor:
    """Return each sequence's sum over tokens; the logits at a position predict the next token."""
    inputs, given = _split(model, batch)
    return _token_loss(model(**inputs).logits[:, :-1], given[:, 1:], labels)


def token_loss(model, batch: Mapping[str, Any], labels: str = "true") -> Tensor:
    """Return each sequence's sum over tokens; logits predict their own position (masked LM, T5, tagging)."""
    inputs, given = _split(model, batch)
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["labels"] = given  # from which the decoder's inputs are made
    return _token_loss(model(**inputs).logits, given, labels)


def _token_loss(logits: Tensor, given: Tensor, labels: str) -> Tensor:
    logits = wide(logits)
    chosen = torch.where(given == IGNORED, IGNORED, _choose(logits, given, labels))
    return F.cross_entropy(logits.transpose(1, 2), chosen, reduction="none", ignore_index=IGNORED).sum(1)


def _split(model, batch: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
    if not isinstance(batch, Mapping) or "labels" not in batch:
        raise ValueError(f"batch must be a mapping that holds 'labels', got {type(batch).__name__}")
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
