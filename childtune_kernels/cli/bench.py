"""`childtune bench`: the optimizer step against torch and against the released algorithm, in one run.

A row of ours is measured only if the implementation is bitwise equal to the reference on the same device and dtype.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
from collections.abc import Iterable
from datetime import date
from pathlib import Path

import torch

from .. import ChildAdamW, ops
from ..measure import timing
from ..measure.peers import contenders, random_masks, touched_groups
from ..measure.shapes import SHAPES
from .inputs import Results, device, output_file, whole, write_text
from .text import Refused

# A column's title -> its key in `summary`; columns that a device does not have are left out.
COLUMNS = {"host ms": "host", "device ms": "device", "busy ms": "busy", "of copy": "share", "launches": "launches"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    failed = [impl for impl in impls if not is_bitwise_reference(impl, device, dtype)]
    for impl in failed:
        print(f"refused: {impl} differs from the reference on {device.type} in {args.dtype}")
    rows = _rows([i for i in impls if i not in failed], args)
    shapes = SHAPES[model]()
    results: dict[str, list[dict]] = {name: [] for name in rows}
    bandwidths = []
    for turn in range(args.rounds):
        bandwidths.append(timing.copy_bandwidth(device))
        for name, (rule, factory) in rows.items():
            if turn and "compiled" in name:
                continue  # half a minute of compilation each time
            results[name].append(_measure(rule, factory, shapes, device, dtype, args.repeats))
    report = {
        "date": date.today().isoformat(),
        "commit": commit(),
        "machine": timing.machine(device),
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


def _measure(rule: str, factory, shapes, device: torch.device, dtype: torch.dtype, repeats: int) -> dict:
    """Build the parameters and one optimizer, time its step, and free them."""
    params = [torch.nn.Parameter(torch.randn(shape, device=device, dtype=dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = factory(params)
    if getattr(optimizer, "pack_gradients", False):
        for p in optimizer.hooks.hooks:  # what the hooks do in a backward pass
            optimizer.hooks.hooks[p](p)
    result = timing.time_steps(optimizer.step, device, repeats)
    result |= timing.kernels_of(optimizer.step, device)
    result["extra_bytes"] = timing.extra_memory(optimizer.step, device)
    if isinstance(optimizer, ChildAdamW):
        result["recompilations"] = timing.count_recompilations(optimizer.step, device)
        if optimizer.mask is not None:
            result["touched"] = touched_groups(optimizer.mask)
            result["state_bytes"] = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
            result["state_bytes"] += optimizer.packing.nbytes() if optimizer.packing else 0
    if rule != "D":  # what the step must move: weights and moments read and written, gradients read
        moments = optimizer.state[params[0]]["exp_avg"].element_size()
        result["bytes"] = sum(p.numel() for p in params) * (3 * params[0].element_size() + 4 * moments)
    del optimizer, params
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return result


def is_bitwise_reference(impl: str, device: torch.device, dtype: torch.dtype) -> bool:
    """The gate: three steps of every rule over awkward sizes, compared bit for bit."""
    sizes = [(0,), (1,), (33,), (1023,), (1024,), (1025,), (257, 129)]
    for rule in ("none", "F", "D", "D, dense", "F in D", "D, packed gradient"):
        both = []
        for name in (impl, "reference"):
            generator = torch.Generator().manual_seed(0)
            params = [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in sizes]
            torch.manual_seed(0)
            options = {"mask": random_masks(params, 0.1)} if "D" in rule else {}
            options |= {"reserve_p": 0.3} if "F" in rule else {}
            options |= {"state": "dense"} if "dense" in rule else {}
            options |= {"pack_gradients": True, "max_grad_norm": math.inf} if "gradient" in rule else {}
            optimizer = ChildAdamW(params, lr=1e-3, impl=name, **options)
            for _ in range(3):
                for p in params:
                    p.grad = torch.randn(p.shape, generator=generator).to(device, dtype)
                    if optimizer.pack_gradients and p in optimizer.hooks.hooks:
                        optimizer.hooks.hooks[p](p)
                optimizer.step()
                optimizer.zero_grad()
            both.append([*params, *(t for p in params for t in optimizer.state[p].values())])
        if not all(torch.equal(a, b) for a, b in zip(*both, strict=True)):
            return False
    return True


def summary(report: dict) -> dict[str, dict]:
    """Return, for each row, medians over rounds, the extreme rounds, and the share of copy bandwidth."""
    bandwidth = statistics.median(report["copy_bandwidth"])
    rows = {}
    for name, rounds in report["rows"].items():
        row = {
            k: statistics.median(r[k] for r in rounds)
            for k in ("step", "host", "device", "busy", "bytes")
            if k in rounds[0]
        }
        row["least"], row["most"] = min(r["step"] for r in rounds), max(r["step"] for r in rounds)
        row["launches"] = rounds[0].get("launches")
        if "bytes" in row:
            row["share"] = row["bytes"] / (row.get("device", row["step"]) / 1e3) / bandwidth
        rows[name] = row
    return rows


def table(report: dict) -> str:
    """Return the report as a text table."""
    where = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    bandwidth, millions = statistics.median(report["copy_bandwidth"]) / 1e9, report["parameters"] / 1e6
    rows = summary(report)
    measured = {title: key for title, key in COLUMNS.items() if any(row.get(key) is not None for row in rows.values())}
    lines = [
        f"{report['model']}: {report['tensors']} tensors, {millions:.1f} M weights, {report['dtype']}",
        f"{where}; copy bandwidth {bandwidth:.0f} GB/s; {len(report['copy_bandwidth'])} rounds",
        " ".join([f"{'':50} {'step ms':>9} {'spread':>15}", *(f"{title:>9}" for title in measured)]),
    ]
    for name, row in rows.items():
        spread = f"{row['least']:7.3f}-{row['most']:7.3f}"
        lines.append(f"{name:50} {row['step']:9.3f} {spread} {_cells(row, measured.values())}".rstrip())
    return "\n".join(lines)


def _cells(row: dict, keys: Iterable[str]) -> str:
    values = (row.get(key) for key in keys)
    return " ".join(f"{'' if v is None else v if isinstance(v, int) else f'{v:.3f}':>9}" for v in values)


def commit() -> str:
    """Return what the tree is called."""
    if named := os.environ.get("CHILDTUNE_COMMIT"):  # for a copy of the tree without its history
        return named
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
        )
    except OSError:
        return "unknown"
    return described.stdout.strip() or "unknown"
