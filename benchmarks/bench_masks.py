"""Jaccard of two child networks of BERT-large: `python benchmarks/bench_masks.py RESULT.json` on a CUDA machine.

A row is measured only if its counts equal the reference's. The words of both masks are read once, 84 MB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from childtune_kernels import ChildMask, ops
from childtune_kernels.measure import timing
from childtune_kernels.measure.shapes import SHAPES


def random_mask(density: float, device: torch.device) -> ChildMask:
    """Return a random child network of BERT-large, named by position."""
    shapes = {str(i): shape for i, shape in enumerate(SHAPES["bert-large"]())}
    return ChildMask.from_dense({n: torch.rand(shape, device=device) < density for n, shape in shapes.items()})


def expected_counts(a: ChildMask, b: ChildMask) -> list[int]:
    """Return how many weights are in both and in either, by the reference, tensor by tensor."""
    overlap = ops.implementation("reference", a.device.type).overlap_bits
    return sum(overlap(a.words(name), b.words(name)) for name in a).tolist()


def flat_words(mask: ChildMask) -> torch.Tensor:
    """Return all words back to back, at any padding: set bits are all that is counted."""
    return torch.cat([mask.words(name) for name in mask])


def whole_call(call, repeats: int) -> dict[str, float]:
    """Time calls that end with a number on the host: milliseconds, median, least and most."""
    times = []
    for _ in range(repeats + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return spread(times[3:])


def cold(call, device: torch.device, repeats: int) -> dict[str, float]:
    """Time the device from event to event with nothing of the masks in its cache: milliseconds."""
    flush = torch.empty(1 << 28, dtype=torch.uint8, device=device)  # several times an H200's 50 MB of L2
    times = []
    for _ in range(repeats + 3):
        flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return spread(times[3:])


def spread(times: list[float]) -> dict[str, float]:
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


def measure(overlap, x: torch.Tensor, y: torch.Tensor, bandwidth: float, repeats: int) -> dict:
    """Time one implementation's ``overlap_bits``."""
    from_memory = cold(lambda: overlap(x, y), x.device, repeats)
    return {
        "launch and number, ms": whole_call(lambda: overlap(x, y).tolist(), repeats),
        "device, cache flushed, ms": from_memory,
        "of copy bandwidth": 2 * x.nbytes / (from_memory["median"] / 1e3) / bandwidth,
        "queued, ms": timing.time_steps(lambda: overlap(x, y), x.device, repeats),
    }


def main() -> int:
    """Measure, print and write; return 1 if an implementation miscounts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path, help="write the numbers to this file")
    parser.add_argument("--repeats", type=int, default=50)
    args = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    a, b = random_mask(0.3, device), random_mask(0.1, device)
    x, y = flat_words(a), flat_words(b)
    bandwidth = timing.copy_bandwidth(device)
    both, either = expected = expected_counts(a, b)
    rows, refused = {}, a.jaccard(b) != both / either
    for impl in [i for i in ("triton", "csrc") if ops.unavailable(i, "cuda") is None]:
        overlap = ops.implementation(impl, "cuda").overlap_bits
        if (got := overlap(x, y).tolist()) == expected:
            rows[impl] = measure(overlap, x, y, bandwidth, args.repeats)
        else:
            refused = True
            print(f"refused: {impl} counts {got}, the reference {expected}")
    rows["ChildMask.jaccard"] = {"launch and number, ms": whole_call(lambda: a.jaccard(b), args.repeats)}
    report = {
        "machine": timing.machine(device),
        "weights": sum(a.shape(name).numel() for name in a),
        "bytes": 2 * x.nbytes,
        "copy bandwidth, GB/s": bandwidth / 1e9,
        "counts": expected,
        "rows": rows,
    }
    args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return int(refused)


if __name__ == "__main__":
    raise SystemExit(main())
