"""Jaccard of two child networks of BERT-large: `python benchmarks/bench_masks.py RESULT.json` on a CUDA machine.

A row is measured only if its counts equal the reference's. The words of both masks are read once, 84 MB.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch

from childtune_kernels import ChildMask, ops
from childtune_kernels.measure import results, timing
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


def whole_call(call: Callable[[], object], repeats: int) -> dict[str, float]:
    """Time calls that end with a number on the host: milliseconds, median, least and most."""
    times = []
    for _ in range(repeats + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return spread(times[3:])


def cold(call: Callable[[], object], device: torch.device, repeats: int) -> dict[str, float]:
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
    """Return the median, the least and the most."""
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


def measure_overlap(
    overlap: Callable[..., torch.Tensor], x: torch.Tensor, y: torch.Tensor, bandwidth: float, repeats: int
) -> dict:
    """Time one implementation's ``overlap_bits``."""
    from_memory = cold(lambda: overlap(x, y), x.device, repeats)
    return {
        "launch and number, ms": whole_call(lambda: overlap(x, y).tolist(), repeats),
        "device, cache flushed, ms": from_memory,
        "of copy bandwidth": 2 * x.nbytes / (from_memory["median"] / 1e3) / bandwidth,
        "queued, ms": timing.time_steps(lambda: overlap(x, y), x.device, repeats),
    }


def measure(repeats: int) -> Iterator[dict]:
    """Count the overlap of two masks with every implementation, and time those that count right."""
    device = torch.device("cuda", torch.cuda.current_device())
    a, b = random_mask(0.3, device), random_mask(0.1, device)
    x, y = flat_words(a), flat_words(b)
    bandwidth = timing.copy_bandwidth(device)
    both, either = expected = expected_counts(a, b)
    weights = sum(a.shape(name).numel() for name in a)
    yield {"weights": weights, "bytes": 2 * x.nbytes, "copy bandwidth, GB/s": bandwidth / 1e9, "counts": expected}
    for impl in [i for i in ("triton", "csrc") if ops.unavailable(i, "cuda") is None]:
        overlap = ops.implementation(impl, "cuda").overlap_bits
        if (got := overlap(x, y).tolist()) == expected:
            yield {"rows": {impl: measure_overlap(overlap, x, y, bandwidth, repeats)}}
        else:
            yield {"refused": [f"{impl} counts {got}, the reference {expected}"]}
    if (found := a.jaccard(b)) == both / either:
        yield {"rows": {"ChildMask.jaccard": {"launch and number, ms": whole_call(lambda: a.jaccard(b), repeats)}}}
    else:
        yield {"refused": [f"ChildMask.jaccard is {found}, by the reference's counts {both / either}"]}


if __name__ == "__main__":
    raise SystemExit(results.main(__doc__, measure, repeats=50))
