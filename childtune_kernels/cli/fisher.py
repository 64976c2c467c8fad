"""`childtune fisher`: the child network of a Hugging Face checkpoint for a task, from files to a file."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch

from .. import estimate_fisher
from ..fisher import causal_lm_loss, classification_loss, regression_loss
from ..fisher.estimate import LABELS, RULES
from ._text import output_file

HEADS = {"classification": classification_loss, "regression": regression_loss, "causal-lm": causal_lm_loss}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `childtune fisher`."""
    parser.add_argument("checkpoint", type=Path, help="folder of a Hugging Face model with its tokenizer")
    parser.add_argument("task", type=Path, help='JSON lines: {"text": ..., "text_pair": ..., "label": ...}')
    parser.add_argument("--out", type=output_file(".safetensors"), required=True, metavar="MASK.safetensors")
    parser.add_argument("--p", type=float, default=0.1, help="the child's share of the weights in scope")
    parser.add_argument("--head", choices=HEADS, help="default: by the labels: none, numbers with a point, others")
    parser.add_argument("--rule", choices=RULES, default="exact")
    parser.add_argument("--labels", choices=LABELS, default="true")
    parser.add_argument("--scope", choices=("backbone", "all", "released"), default="backbone")
    parser.add_argument("--per-tensor", action="store_true", help="take the share of each tensor by itself")
    parser.add_argument("--lowest", action="store_true", help="take the lowest information instead of the highest")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=128, help="in tokens; longer texts are cut")
    parser.add_argument("--limit", type=int, help="stop after this many batches")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--bfloat16", action="store_true", help="compute under bfloat16 autocast")
    parser.add_argument("--save-fisher", type=output_file(".safetensors"), metavar="FISHER.safetensors")
    parser.add_argument("--report", action="store_true", help="print how each parameter was estimated")


def run(args: argparse.Namespace) -> int:
    """Estimate, select and write; return 1, with one line of why, where that fails."""
    missing = [name for name in ("transformers", "safetensors") if importlib.util.find_spec(name) is None]
    if missing:
        return _fail(f"this needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    try:
        rows = read_task(args.task)
        head = args.head or _head_of(rows)
        device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
        tokenizer, model = load(args.checkpoint, head, rows, device)
        fisher = estimate_fisher(
            model,
            batches(rows, tokenizer, head, args.batch_size, args.max_length),
            _autocast(HEADS[head], device) if args.bfloat16 else HEADS[head],
            rule=args.rule,
            labels=args.labels,
            limit=args.limit,
            progress=sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None,
        )
        options = dict(scope=args.scope, per_tensor=args.per_tensor)
        mask = fisher.bottom(args.p, **options) if args.lowest else fisher.top(args.p, **options)
    except (OSError, ValueError) as error:
        return _fail(str(error))
    mask.save(args.out)
    if args.save_fisher:
        fisher.save(args.save_fisher)
    if args.report:
        print(fisher.report())
    unit = "examples" if args.rule == "exact" else "batches"
    print(f"{head}, {fisher.count:,} {unit}, rule {args.rule!r}; {args.out}: {mask}, digest {mask.digest()}")
    return 0


def read_task(path: Path) -> list[dict[str, Any]]:
    """Read the examples.

    Raises:
        ValueError: naming the line that is no JSON object, has no text, or has a label where another has none.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} must be a JSON object, got {line[:40]!r}: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise ValueError(f'{path}, line {number} must be a JSON object with a "text", got {line[:40]!r}')
        if ("label" in row) != ("label" in (rows or [row])[0]):
            raise ValueError(f"{path}, line {number} must have a label like the first line, or none like it")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} must hold at least one example, got none")
    return rows


def _head_of(rows: list[dict[str, Any]]) -> str:
    if "label" not in rows[0]:
        return "causal-lm"
    return "regression" if any(isinstance(row["label"], float) for row in rows) else "classification"


def load(checkpoint: Path, head: str, rows: list[dict[str, Any]], device: str):
    """Load tokenizer and model from files only; a classification head gets as many classes as the task has.

    Raises:
        ValueError: the folder holds no model, or has another number of classes than the task.
    """
    import transformers

    if not (checkpoint / "config.json").is_file():
        raise ValueError(f"checkpoint must be a folder with a config.json, got {checkpoint}")
    kind = transformers.AutoModelForCausalLM if head == "causal-lm" else transformers.AutoModelForSequenceClassification
    options = {}
    if head != "causal-lm":
        classes = 1 if head == "regression" else 1 + max(_class_of(row) for row in rows)
        options = {"num_labels": max(classes, 2) if head == "classification" else 1, "ignore_mismatched_sizes": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    model = kind.from_pretrained(checkpoint, local_files_only=True, dtype=torch.float32, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return tokenizer, model.to(device)


def _class_of(row: dict[str, Any]) -> int:
    label = row["label"]
    if not isinstance(label, int) or isinstance(label, bool) or label < 0:
        raise ValueError(f"labels must be class numbers from 0 on, got {label!r}")
    return label


def batches(rows: list[dict[str, Any]], tokenizer, head: str, size: int, max_length: int):
    """Yield batches in the file's order, padded to their longest text."""
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        pairs = [row.get("text_pair") or "" for row in part]
        batch = dict(
            tokenizer(
                [row["text"] for row in part],
                pairs if any(pairs) else None,
                truncation=True,
                max_length=max_length,
                padding=True,
                return_tensors="pt",
            )
        )
        if head == "causal-lm":
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        else:
            labels = torch.tensor([row["label"] for row in part])
        yield {**batch, "labels": labels}


def _autocast(loss, device: str):
    def under_autocast(model, batch, **options):
        with torch.autocast(device, torch.bfloat16):
            return loss(model, batch, **options)

    return under_autocast


def _fail(reason: str) -> int:
    print(f"childtune fisher: {reason}", file=sys.stderr)
    return 1
