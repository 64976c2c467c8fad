"""`childtune bench`: the optimizer step against torch and against the released algorithm, in one run.

A row of ours is measured only if the implementation is bitwise equal to the reference on the same device and dtype.
"""

from __future__ import annotations

import argparse
import json
import math

import torch

from .. import ops
from ..measure.parity import difference
from ..measure.peers import contenders
from ..measure.results import DTYPES, measure_step, skeleton, table
from ..measure.shapes import SHAPES
from ..measure.timing import copy_bandwidth
from .inputs import Results, device, output_file, whole, write_text
from .text import Refused


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--model", choices=SHAPES, help="whose parameter shapes (default: bert-large, on a CPU bert-small)"
    )
    parser.add_argument("--device", type=device, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and gradients")
    parser.add_argument(
        "--impl", nargs="+", choices=ops.IMPLEMENTATIONS, help="ours to measure (default: the fast ones)"
    )
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="rows whose name contains one of these")
    parser.add_argument(
        "--skip",
        nargs="+",
        default=(),
        metavar="TEXT",
        help="leave these out (default: none)",
    )
    parser.add_argument("--rounds", type=whole(1), default=3, help="how often the whole list is measured")
    parser.add_argument("--repeats", type=whole(1), default=20, help="steps timed a round")
    parser.add_argument("--group-each", action="store_true", help="put every tensor in a parameter group of its own")
    parser.add_argument("--json", type=output_file(".json"), metavar="FILE.json", help="write the numbers to this file")


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the file; return 1 if a parity gate fails."""
    device = torch.device(args.device)
    model = args.model or ("bert-large" if device.type == "cuda" else "bert-small")
    dtype = DTYPES[args.dtype]
    impls = args.impl or [i for i in ("triton", "csrc") if ops.unavailable(i, device.type) is None] or ["reference"]
    for impl in impls:
        if reason := ops.unavailable(impl, device.type):
            raise Refused(f"--impl {impl} is not available on {device.type}: {reason}")
    if not _rows(impls, args):
        raise Refused(f"--only and --skip must leave a row, of {', '.join(contenders(impls, args.group_each))}")
    found = {impl: difference(impl, device, dtype) for impl in impls}
    failed = {impl: how for impl, how in found.items() if how}
    for impl, how in failed.items():
        print(f"refused: {impl} differs from the reference on {device.type} in {args.dtype}: {how}")
    rows = _rows([i for i in impls if i not in failed], args)
    shapes = SHAPES[model]()
    torch.manual_seed(0)  # the same weights, gradients and children in every run
    results: dict[str, list[dict]] = {name: [] for name in rows}
    bandwidths = []
    for turn in range(args.rounds):
        bandwidths.append(copy_bandwidth(device))
        for name, (rule, factory) in rows.items():
            if turn and "compiled" in name:
                continue  # half a minute of compilation each time
            results[name].append(measure_step(rule, factory, shapes, device, dtype, args.repeats))
    report = skeleton(device) | {
        "model": model,
        "tensors": len(shapes),
        "parameters": sum(map(math.prod, shapes)),
        "dtype": args.dtype,
        "groups": "one a tensor" if args.group_each else "one",
        "repeats": args.repeats,
        "parity": "every row of ours: bitwise equal to the reference on this device and dtype",
        "copy_bandwidth": bandwidths,
        "rows": results,
    }
    print(table(report))
    files = Results()
    files.keep(args.json, write_text(json.dumps(report, indent=1) + "\n"))
    files.close()
    return 1 if failed else 0


def _rows(impls: list[str], args: argparse.Namespace) -> dict:
    """Return the contenders that ``--only`` and ``--skip`` leave."""
    return {
        name: entry
        for name, entry in contenders(impls, args.group_each).items()
        if (not args.only or any(text in name for text in args.only)) and not any(text in name for text in args.skip)
    }
