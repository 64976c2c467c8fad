"""`childtune doctor`: what is installed, which implementation serves which device, and whether the bits agree."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import torch

from .. import __version__, ops
from ..measure.parity import STEPS, difference
from ..measure.timing import machine

DEVICE_TYPES = ("cpu", "cuda")
BUILT = Path(__file__).resolve().parent.parent / "_build.txt"  # setup.py writes it: pip shows no output of a build


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`childtune doctor` takes no arguments."""


def run(args: argparse.Namespace) -> int:
    """Print the report; return 1 if any implementation that says it is available fails its check."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = {"childtune_kernels": __version__, "platform": platform.platform(), **machine(device)}
    print("\n".join(f"{name:<18} {value}" for name, value in report.items()))
    print("\n".join(f"{'build of csrc':<18} {line}" for line in build_record()), end="\n\n")
    healthy, advice = True, []
    for device_type in DEVICE_TYPES:
        absent = device_type == "cuda" and not torch.cuda.is_available()
        chosen = None if absent else ops.implementation("auto", device_type).NAME
        for impl in ops.IMPLEMENTATIONS:
            reason = "torch sees no CUDA device" if absent else ops.unavailable(impl, device_type)
            failure = None if reason else difference(impl, device_type)
            healthy &= failure is None
            verdict = f"no: {reason}" if reason else f"FAILED: {failure}" if failure else "yes"
            print(f"{device_type:<5} {impl:<12} {verdict}{'  <- auto' if impl == chosen else ''}")
        if chosen:
            advice.append(f"{device_type} uses {chosen}{faster_than(chosen, device_type)}")
    print("\n" + "\n".join(advice))
    print(f"\n{STEPS} steps of F and of D, bit for bit against the reference: {'OK' if healthy else 'FAILED'}")
    return 0 if healthy else 1


def build_record() -> list[str]:
    """Return what setup.py built of csrc and what it could not, and why."""
    if not BUILT.is_file():
        return ["no record: this package was not installed by pip, or by an older setup.py"]
    return BUILT.read_text(encoding="utf-8").splitlines()


def faster_than(chosen: str, device_type: str) -> str:
    """Return how to get what is faster on a device than the implementation in use."""
    ways = ["pip install --no-build-isolation . where there is a compiler"] if chosen == "reference" else []
    if device_type == "cuda" and chosen != "triton":
        ways.append("pip install 'childtune_kernels[triton]'")
    return f"; for a faster one: {', or '.join(ways)}" if ways else ""
