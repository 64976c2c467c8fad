"""Time of step() in two checkouts, in turns: `python benchmarks/bench_before_after.py BEFORE AFTER RESULT.json`.

BEFORE and AFTER are folders that hold a checkout each, csrc built. Every round runs one process of each,
so that a noisy host is noisy for both; ratios are of the same round. BERT-large's 393 tensors.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator

ROUNDS, STEPS, PROFILED = 3, 60, 20
ROWS = {  # name -> dtype of the weights, options
    "plain fp32": ("float32", {}),
    "F fp32": ("float32", dict(reserve_p=0.3)),
    "D fp32": ("float32", dict(mask=0.1)),
    "D dense fp32": ("float32", dict(mask=0.1, state="dense")),
    "F bf16 stochastic": ("bfloat16", dict(reserve_p=0.3)),
    "plain bf16 master": ("bfloat16", dict(low_precision="master")),
    "F bf16 kahan": ("bfloat16", dict(reserve_p=0.3, low_precision="kahan")),
    "D bf16 master": ("bfloat16", dict(mask=0.1)),
    "plain bf16 nearest": ("bfloat16", dict(low_precision="nearest")),
    "plain fp32, csrc": ("float32", dict(impl="csrc")),
    "D fp32, csrc": ("float32", dict(mask=0.1, impl="csrc")),
}


def measure() -> dict[str, dict[str, float]]:
    """Return, for each row, the milliseconds until step() returns (median) and those that its kernels run."""
    import torch

    from childtune_kernels import ChildAdamW, ChildMask
    from childtune_kernels.measure.shapes import bert_large

    warnings.filterwarnings("ignore")
    shapes = {f"layer.{i}.weight": shape for i, shape in enumerate(bert_large())}
    mask = ChildMask.random(shapes, 0.1, 0, device="cuda").to("cpu")
    result = {}
    for name, (dtype, options) in ROWS.items():
        options = {**options, "mask": mask} if "mask" in options else options
        new = dict(device="cuda", dtype=getattr(torch, dtype))
        named = [(n, torch.nn.Parameter(torch.empty(shape, **new).normal_(std=0.02))) for n, shape in shapes.items()]
        optimizer = ChildAdamW(named, **{"lr": 1e-5, "impl": "triton", **options})
        for _, param in named:
            param.grad = torch.empty_like(param).normal_(std=1e-3)
        for _ in range(5):
            optimizer.step()
        host = []
        for _ in range(STEPS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            optimizer.step()
            host.append((time.perf_counter() - start) * 1e3)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(PROFILED):
                optimizer.step()
            torch.cuda.synchronize()
        cuda = torch.autograd.DeviceType.CUDA
        busy = sum(e.device_time_total for e in profile.key_averages() if e.device_type == cuda)
        result[name] = dict(host=statistics.median(host), busy=busy / PROFILED / 1e3)
        del optimizer, named
        torch.cuda.empty_cache()
    return result


def in_checkout(folder: str) -> dict:
    """Measure in a process of its own, with one checkout's package, which need know nothing of this script."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([os.path.abspath(folder), os.path.dirname(os.path.abspath(__file__))])
    }
    code = "import json, sys, bench_before_after; json.dump(bench_before_after.measure(), open(sys.argv[1], 'w'))"
    with tempfile.NamedTemporaryFile() as file:
        subprocess.run([sys.executable, "-c", code, file.name], env=environment, check=True, cwd=folder)
        return json.load(open(file.name))


def summary(before: list[dict], after: list[dict]) -> dict:
    """Return medians over rounds and each round's ratios, by row."""
    rows = {}
    for name in before[0]:
        sides = {"before": before, "after": after}
        rows[name] = {s: {k: statistics.median(r[name][k] for r in rs) for k in rs[0][name]} for s, rs in sides.items()}
        pairs = list(zip(before, after, strict=True))
        rows[name]["ratios"] = {k: [b[name][k] / a[name][k] for a, b in pairs] for k in before[0][name]}
    return rows


def compare(before: str, after: str) -> Iterator[dict]:
    """Measure both checkouts in turns."""
    rounds: dict[str, list[dict]] = {"before": [], "after": []}
    for _ in range(ROUNDS):
        for side, folder in zip(rounds, (before, after), strict=True):
            rounds[side].append(in_checkout(folder))
    rows = summary(**rounds)
    for name, row in rows.items():
        spans = [f"{key} {min(r):.3f} .. {max(r):.3f}" for key, r in row["ratios"].items()]
        print(f"{name:24} {row['before']} -> {row['after']}; ratios: {', '.join(spans)}")
    yield {"unit": "ms", "rows": rows}


if __name__ == "__main__":
    from childtune_kernels.measure import results  # not above: a checkout that is measured may lack it

    raise SystemExit(results.main(__doc__, compare, positional=("before", "after")))
