"""`childtune fisher`: the child network of a Hugging Face checkpoint for a task, from files to a file."""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch

from .. import estimate_fisher
from ..fisher.estimate import RULES
from ..fisher.losses import LABELS
from .checkpoint import HEADS, LENGTH, batches, length_for, load, try_texts
from .inputs import Results, device, output_file, quiet_transformers, require_apart, require_packages, share, whole
from .task import check_labels, head_of, read_task
from .text import Refused

SCOPES = ("backbone", "all", "released")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `childtune fisher`."""
    parser.add_argument("checkpoint", type=Path, help="folder of a Hugging Face model with its tokenizer")
    parser.add_argument("task", type=Path, help='JSON lines: {"text": ..., "text_pair": ..., "label": ...}')
    parser.add_argument(
        "--out",
        type=output_file(".safetensors"),
        required=True,
        metavar="MASK.safetensors",
        help="the file to write",
    )
    parser.add_argument("--p", type=share, default=0.1, help="the child's share of the weights in scope")
    parser.add_argument(
        "--head",
        choices=HEADS,
        help="what the model is to predict (default: without labels causal-lm, the next token, for a model that cannot "
        "see it; regression if any label has a point, as 3.0; else classification, labels being class numbers from 0 "
        "on). The checkpoint's own task head is kept; one that it lacks is drawn at random, by --seed, and Fisher "
        "information depends on what was drawn",
    )
    parser.add_argument(
        "--rule",
        choices=RULES,
        default="exact",
        help="exact: the square of every single example's gradient, as in the paper; batch: of every batch's mean "
        "gradient; released: the same, clipped and with dropout, as the paper's code does it",
    )
    parser.add_argument(
        "--labels",
        choices=LABELS,
        default="true",
        help="whose labels: true: the task's, as in the paper; sampled: drawn from what the model predicts; predicted: "
        "the likeliest of these",
    )
    parser.add_argument(
        "--scope",
        choices=SCOPES,
        default="backbone",
        help="what the child is chosen from, all else being trained fully: backbone: the pretrained part; all: "
        "everything; released: parameters with 'layer' in their name, as the paper's code does it",
    )
    parser.add_argument("--per-tensor", action="store_true", help="take the share of each tensor by itself")
    parser.add_argument("--lowest", action="store_true", help="take the lowest information instead of the highest")
    parser.add_argument("--batch-size", type=whole(1), default=16, help="examples computed together")
    parser.add_argument(
        "--max-length",
        type=whole(1),
        help=f"in tokens; longer texts are cut (default: {LENGTH}, or the model's positions where these are fewer)",
    )
    parser.add_argument("--limit", type=whole(1), metavar="N", help="stop after this many batches (default: all)")
    parser.add_argument(
        "--seed", type=whole(0, 2**32 - 1), default=0, metavar="N", help="of a head that is drawn, dropout and sampling"
    )
    parser.add_argument("--device", type=device, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--bfloat16", action="store_true", help="compute under bfloat16 autocast")
    parser.add_argument(
        "--save-fisher",
        type=output_file(".safetensors"),
        metavar="FISHER.safetensors",
        help="also write the information itself, from which other children can be chosen",
    )
    parser.add_argument("--report", action="store_true", help="print how each parameter was estimated")


def run(args: argparse.Namespace) -> int:
    """Look at everything that was given, then estimate, select and write."""
    require_packages(["transformers", "safetensors"], "transformers safetensors")
    quiet_transformers()
    outputs = {"--out": args.out, "--save-fisher": args.save_fisher}
    require_apart(outputs, [args.task, *args.checkpoint.glob("*.safetensors")])
    rows = read_task(args.task)
    head = args.head or head_of(rows)
    check_labels(args.task, rows, head)
    if head == "regression" and args.labels == "predicted":
        raise Refused("--labels must be true or sampled for a regression, got predicted: its gradient is 0")
    seed_everything(args.seed)
    tokenizer, model = load(args.checkpoint, head, rows, "cpu", args.task)
    if args.scope == "released" and not any("layer" in name for name, _ in model.named_parameters()):
        raise Refused("--scope released must find parameters with 'layer' in their name, got none in this model")
    length = length_for(model, args.max_length)
    causal = try_texts(tokenizer, model, head, rows, length, args.task)
    if head == "causal-lm" and not causal:
        _refuse_what_sees_the_future(args)
    fisher = estimate_fisher(
        model.to(args.device),
        batches(rows, tokenizer, head, args.batch_size, length),
        _autocast(HEADS[head], args.device) if args.bfloat16 else HEADS[head],
        rule=args.rule,
        labels=args.labels,
        limit=args.limit,
        progress=sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None,
    )
    results = Results()
    results.keep(args.save_fisher, fisher.save)
    options = dict(scope=args.scope, per_tensor=args.per_tensor)
    mask = fisher.bottom(args.p, **options) if args.lowest else fisher.top(args.p, **options)
    if args.report:
        print(fisher.report())
    results.keep(args.out, mask.save)
    unit = "examples" if args.rule == "exact" else "batches"
    drawn = f"; drawn at random: {', '.join(model.drawn)}" if model.drawn else ""
    print(f"{head}, {fisher.count:,} {unit}, rule {args.rule!r}; {args.out}: {mask}{drawn}; "
          f"digest {mask.digest()}, seed {args.seed}")  # fmt: skip
    results.close()
    return 0


def seed_everything(seed: int) -> None:
    """Seed whatever a head, dropout or sampling may draw from."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def _refuse_what_sees_the_future(args: argparse.Namespace) -> None:
    """A model that sees the token which it is to predict is no language model, unless the user says that it is."""
    if args.head is None:
        raise Refused(
            f'{args.task} must have a "label" in every line, got none: this model sees the tokens that a causal-lm '
            f"must predict (--head causal-lm takes it for one all the same)"
        )
    warnings.warn("this model sees the tokens that it is asked to predict", stacklevel=2)


def _autocast(loss: Callable[..., torch.Tensor], device: str) -> Callable[..., torch.Tensor]:
    def under_autocast(model: torch.nn.Module, batch: Any, **options: Any) -> torch.Tensor:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            return loss(model, batch, **options)

    return under_autocast
