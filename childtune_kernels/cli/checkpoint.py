"""Tokenizer and model of a checkpoint folder, tried on the texts of a task before the work starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..fisher import causal_lm_loss, classification_loss, regression_loss
from .inputs import model_folder, refusing
from .task import classes_of
from .text import Refused, brief

HEADS = {"classification": classification_loss, "regression": regression_loss, "causal-lm": causal_lm_loss}
LENGTH = 128  # tokens a text, where neither the user nor the model says less
_VOCABULARIES = ("tokenizer.json", "tokenizer_config.json", "vocab.*", "*.model", "*.tiktoken")
_FILES = {"local_files_only": True, "trust_remote_code": False}
Rows = list[dict[str, Any]]


def load(checkpoint: Path, head: str, rows: Rows, device: str, task: Path = Path("the task")):
    """Load tokenizer and model from files only.

    A checkpoint's own task head is kept; where it has none, one is drawn from torch's random state.

    Returns:
        The tokenizer, and the model on the device; ``model.drawn`` names the parameters that were drawn.

    Raises:
        Refused: the folder lacks config, tokenizer or weights, or one of them is damaged or does not fit the others
            or the task's labels.
    """
    import transformers

    model_folder(checkpoint, "checkpoint")
    if not any(path for pattern in _VOCABULARIES for path in checkpoint.glob(pattern)):
        raise Refused(f"{checkpoint} must hold a tokenizer, got none of {', '.join(_VOCABULARIES)}")
    causal = head == "causal-lm"
    kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForSequenceClassification
    with refusing(checkpoint):
        config = transformers.AutoConfig.from_pretrained(checkpoint, **_FILES)
        tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint, **_FILES)
        if not causal:
            config.num_labels = _outputs(config, checkpoint, head, rows, task)
        model, found = kind.from_pretrained(
            checkpoint, config=config, dtype=torch.float32, output_loading_info=True, **_FILES
        )
    drawn, known = sorted(found["missing_keys"]), len(model.state_dict())
    if 2 * len(drawn) > known:
        raise Refused(f"{checkpoint} must hold the weights of its config.json, got {known - len(drawn)} of {known}")
    model.drawn = drawn
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise Refused(f"{checkpoint} must have a tokenizer with a pad or eos token, got neither")
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return tokenizer, model.to(device)


def _outputs(config, checkpoint: Path, head: str, rows: Rows, task: Path) -> int:
    """Return how many outputs the head is to have."""
    own = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    if head == "classification":
        return classes_of(task, rows, config.num_labels if own else None)
    if own and config.num_labels != 1:
        wanted = "a head of 1 output, or none, for a regression"
        raise Refused(f"{checkpoint} must have {wanted}, got one of {config.num_labels} outputs")
    return 1


def encode(rows: Rows, tokenizer, max_length: int) -> list[dict[str, list[int]]]:
    """Return each example's tokens; a pair belongs to its own example, whatever the others of the batch have."""
    options = {"truncation": True, "max_length": max_length}
    return [dict(tokenizer(row["text"], row.get("text_pair") or None, **options)) for row in rows]


def batches(rows: Rows, tokenizer, head: str, size: int, max_length: int):
    """Yield batches in the file's order, padded to their longest text."""
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        batch = dict(tokenizer.pad(encode(part, tokenizer, max_length), return_tensors="pt"))
        if head == "causal-lm":
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        else:
            kind = torch.long if head == "classification" else torch.float32
            labels = torch.tensor([row["label"] for row in part], dtype=kind)
        yield {**batch, "labels": labels}


def length_for(model: nn.Module, wanted: int | None) -> int:
    """Return the length to cut texts at: what was asked for, else `LENGTH`, or the model's positions if fewer.

    Raises:
        Refused: more was asked for than the model has positions.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name.rpartition(".")[2]:
            if module.padding_idx is not None:  # RoBERTa's, which count on from there
                positions = module.num_embeddings - module.padding_idx - 1
    if positions <= 0:  # relative, without a bound
        return wanted or LENGTH
    if wanted is not None and wanted > positions:
        raise Refused(f"--max-length must be at most {positions}, the model's positions, got {wanted}")
    return wanted or min(LENGTH, positions)


@torch.no_grad()
def try_texts(tokenizer, model: nn.Module, head: str, rows: Rows, max_length: int, task: Path) -> bool:
    """Encode every text, and run the model on the longest.

    Returns:
        Whether the model is blind to later tokens, as a causal language model must be.

    Raises:
        Refused: naming the line of a text without a token, or that the model cannot take.
    """
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    with refusing(task):
        encoded = [example["input_ids"] for example in encode(rows, tokenizer, max_length)]
    known = model.get_input_embeddings().num_embeddings
    words = [[token for token in ids if token not in special] for ids in encoded]
    least = 2 if head == "causal-lm" else 1
    for row, ids, own in zip(rows, encoded, words, strict=True):
        where = f"{task}, line {row['line']}"
        if not own or len(ids) < least:
            raise Refused(f"{where} must have {least} tokens or more, got {len(own)} with --max-length {max_length}")
        if max(ids) >= known:
            raise Refused(f"{where} has token {max(ids)}, but the model knows {known}: is this its tokenizer?")
    if all(token == tokenizer.unk_token_id for own in words for token in own):
        raise Refused(f"{task} has no word that the tokenizer knows: does the checkpoint hold its vocabulary?")
    longest = max(range(len(rows)), key=lambda i: len(encoded[i]))
    batch = next(batches([rows[longest]], tokenizer, head, 1, max_length))
    where = f"{task}, line {rows[longest]['line']}, {len(encoded[longest])} tokens"
    try:
        loss = HEADS[head](model, batch)
        finite, causal = bool(loss.isfinite().all()), head == "causal-lm" and _is_causal(model, batch)
    except Exception as error:
        raise Refused(f"the model cannot take {where}: {brief(error)}") from error
    if not finite:
        raise Refused(f"the model must give a finite loss, got {loss.tolist()} for {where}")
    return causal


def _is_causal(model: nn.Module, batch: dict[str, torch.Tensor]) -> bool:
    """Change the last token, and see whether what the model says before it changes."""
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
    ids = inputs["input_ids"].clone()
    ids[:, -1] = (ids[:, -1] + 1) % model.get_input_embeddings().num_embeddings
    before, after = (model(**{**inputs, "input_ids": value}).logits[:, :-1] for value in (inputs["input_ids"], ids))
    return bool((before - after).abs().max() <= 1e-5 * before.abs().max())
