"""The only timing function, and what a benchmark row records beside the time."""

from __future__ import annotations

import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable

import torch

Step = Callable[[], object]


def synchronize(device: torch.device) -> None:
    """Wait until everything queued on the device has run."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step_and_wait(step: Step, device: torch.device) -> None:
    """Take one step and wait until the device has done it."""
    step()
    synchronize(device)


def time_steps(
    step: Step, device: torch.device, repeats: int, warmup: int = 3, before: Step = lambda: None
) -> dict[str, float]:
    """Time ``step()``.

    Args:
        step: what is timed.
        device: where it works.
        repeats: how many steps are timed one by one.
        warmup: how many are taken first.
        before: called before each step, and no part of its time; it must leave the device alone.

    Returns:
        milliseconds: ``step``, ``step_min``, ``step_max``: from the call until the device is done, one step at a
        time, median, least and most; on CUDA also, with steps queueing up behind each other as in a training loop
        that the device limits, ``host``: until the call returns, median, and ``device``: from event to event.
    """
    for _ in range(warmup):
        before()
        step()
    wall = []
    for _ in range(repeats):
        before()
        synchronize(device)
        start = time.perf_counter()
        step_and_wait(step, device)
        wall.append(time.perf_counter() - start)
    times = {"step_min": min(wall) * 1e3, "step": statistics.median(wall) * 1e3, "step_max": max(wall) * 1e3}
    if device.type == "cuda":
        queued = [_queued(step, before) for _ in range(5)]
        times["host"] = statistics.median(host for host, _ in queued)
        times["device"] = statistics.median(busy for _, busy in queued)
    return times


def _queued(step: Step, before: Step, count: int = 10) -> tuple[float, float]:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    host = []
    torch.cuda.synchronize()
    for _ in range(3):  # a head start for the host: the clock then measures the device
        before()
        step()
    begin.record()
    for _ in range(count):
        before()
        start = time.perf_counter()
        step()
        host.append(time.perf_counter() - start)
    end.record()
    torch.cuda.synchronize()
    return statistics.median(host) * 1e3, begin.elapsed_time(end) / count


def copy_bandwidth(device: torch.device) -> float:
    """Return the device's copy bandwidth in bytes a second, read and written bytes both counted."""
    numel = (1 << 30) if device.type == "cuda" else (1 << 26)
    source = torch.rand(numel, device=device)
    target = torch.empty_like(source)
    times = time_steps(lambda: target.copy_(source), device, repeats=10)
    return 2 * source.nbytes / (times.get("device", times["step"]) / 1e3)


def kernels_of(step: Step, device: torch.device, steps: int = 10) -> dict[str, float]:
    """Return how many kernels one step launches, copies not counted, and the milliseconds that they run; {} on a CPU.

    Kernels that take less time than their launch leave gaps between each other. ``busy`` does not count these.
    """
    if device.type != "cuda":
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize(device)
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = [event.time_range.elapsed_us() for event in events if not event.name.startswith(("Memcpy", "Memset"))]
    return {"launches": len(busy) // steps, "busy": sum(busy) / steps / 1e3}


def extra_memory(step: Step, device: torch.device) -> int | None:
    """Return the bytes that one step allocates beyond what it found, or None on a CPU."""
    if device.type != "cuda":
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def count_recompilations(step: Step, device: torch.device, steps: int = 40) -> int | None:
    """Return how many kernels Triton compiles during ``steps`` steps after those already taken; None on a CPU."""
    if device.type != "cuda":
        return None
    import triton

    compiled = []
    previous = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda **event: compiled.append(event["repr"])
    try:
        for _ in range(steps):
            step()
    finally:
        triton.knobs.runtime.jit_post_compile_hook = previous
    return len(compiled)


def machine(device: torch.device) -> dict[str, str]:
    """Describe where a number was measured."""
    described = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
    }
    try:
        import triton

        described["triton"] = triton.__version__
    except ImportError:
        described["triton"] = "absent"
    if device.type == "cuda":
        described["device"] = torch.cuda.get_device_name(device)
        described["driver"] = _driver()
        described["cuda"] = torch.version.cuda
    else:
        described["device"] = _cpu_name()
        described["capability"] = torch.backends.cpu.get_cpu_capability()
    return described


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown (no nvidia-smi)"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":")[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
