"""What is written of a measurement: an optimizer's row, the table of a report, and a benchmark script's whole file."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from .. import ChildAdamW
from ..files import replacing
from . import timing
from .peers import Factory, touched_groups

# A column's title -> its key in `summary`; columns that a device does not have are left out.
COLUMNS = {"host ms": "host", "device ms": "device", "busy ms": "busy", "of copy": "share", "launches": "launches"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def skeleton(device: torch.device) -> dict[str, Any]:
    """Return what every report begins with: when, of which commit and where it was made."""
    return {"date": date.today().isoformat(), "commit": commit(), "machine": timing.machine(device)}


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


# ---- the step of an optimizer ---------------------------------------------------------------------------------------


def measure_step(
    rule: str,
    factory: Factory,
    shapes: Sequence[tuple[int, ...]],
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
) -> dict:
    """Build the parameters and one optimizer, and time its step; rule and factory as in `contenders`."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of what the last one held
    params = [torch.nn.Parameter(torch.randn(shape, device=device, dtype=dtype)) for shape in shapes]
    optimizer = factory(params)
    for p in params:
        p.backward(torch.randn_like(p))  # so that hooks see it, where gradients are packed
    refill = _refill(optimizer)

    def step() -> None:
        refill()
        optimizer.step()

    result = timing.time_steps(optimizer.step, device, repeats, before=refill)
    result |= timing.kernels_of(step, device)
    result["extra_bytes"] = timing.extra_memory(step, device)
    _require_steps(step, optimizer, params)
    if isinstance(optimizer, ChildAdamW):
        result["recompilations"] = timing.count_recompilations(step, device)
        if optimizer.mask is not None:
            result["touched"] = touched_groups(optimizer.mask)
            result["state_bytes"] = optimizer.memory().state
    if rule != "D":  # what the step must move: weights and moments read and written, gradients read
        moments = optimizer.state[params[0]]["exp_avg"].element_size()
        result["bytes"] = sum(p.numel() for p in params) * (3 * params[0].element_size() + 4 * moments)
    return result


def _refill(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Return what gives an optimizer back the packed gradients that a step has used up; others stay in p.grad."""
    if not (isinstance(optimizer, ChildAdamW) and optimizer.config.pack_gradients):
        return lambda: None
    optimizer.hooks.pack()
    packed = [(hook, hook.grad) for hook in optimizer.hooks.hooks.values()]

    def refill() -> None:
        for hook, grad in packed:
            hook.grad = grad

    return refill


def _require_steps(step: Callable[[], None], optimizer: torch.optim.Optimizer, params: list[torch.Tensor]) -> None:
    """Refuse to have timed a step that passes parameters by, as one without gradients does."""
    taken = [int(optimizer.state[p]["step"]) for p in params]
    step()
    passed = sum(int(optimizer.state[p]["step"]) != t + 1 for p, t in zip(params, taken, strict=True))
    if passed:
        raise RuntimeError(f"a step that is timed must update all {len(params)} parameters, got one without {passed}")


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


# ---- the command line of a script -----------------------------------------------------------------------------------


def main(
    description: str | None,
    measure: Callable[..., Iterator[dict[str, Any]]],
    *,
    device: str = "cuda",
    positional: Sequence[str] = (),
    **flags: Any,
) -> int:
    """Run a benchmark script: ``bench_x.py RESULT.json``, with its own flags.

    Args:
        description: the script's docstring.
        measure: called with the flags' values by name; yields parts of the report. Each is printed, added to the report
            and written before the next is measured. Reasons under "refused" say which numbers are missing.
        device: the type of device that is measured.
        positional: names of words that come before the result's file.
        flags: name -> default; of a tuple, any of its words may be given.

    Returns:
        The exit code: 1 where something was refused.
    """
    parser = argparse.ArgumentParser(description=description)
    for name in positional:
        parser.add_argument(name)
    parser.add_argument("result", type=Path, metavar="RESULT.json", help="write the numbers to this file")
    for name, default in flags.items():
        several = isinstance(default, tuple)
        kind = dict(nargs="*", choices=default) if several else dict(type=type(default))
        parser.add_argument(f"--{name}", default=default, help=f"default: {default}", **kind)
    options = vars(parser.parse_args())
    path = options.pop("result")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("needs a CUDA device, and torch sees none")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    report = skeleton(torch.device(device))
    for part in measure(**options):
        print(json.dumps(part, indent=1), flush=True)
        _add(report, part)
        with replacing(path) as partial:
            partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if report.get("refused") else 0


def _add(report: dict[str, Any], part: dict[str, Any]) -> None:
    """Add a part to a report: lists and mappings that are there already grow."""
    for key, value in part.items():
        if isinstance(value, dict):
            report[key] = report.get(key, {}) | value
        elif isinstance(value, list):
            report[key] = report.get(key, []) + value
        else:
            report[key] = value
