"""Comparing methods: each tuned and run on the same seeds, differences from vanilla seed by seed, and their picture."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from .. import __version__
from ..measure.timing import machine
from .digits import Images, Protocol, Task
from .training import METHODS, TUNING_SEED, Run, fine_tune, pretrain


def experiment(methods: Sequence[str], seeds: int, task: Task, protocol: Protocol) -> dict:
    """Tune and run every method.

    Returns:
        Everything that was measured, as plain values: ``methods`` maps a name to its scores, in the order given.
    """
    from tqdm import tqdm

    results = {
        "childtune_kernels": __version__,
        "seeds": seeds,
        "protocol": dataclasses.asdict(protocol),
        "methods": {},
    }
    start = time.perf_counter()
    total = protocol.total_steps(len(methods), seeds)
    with one_thread(), tqdm(total=total, unit="step", leave=False, disable=None) as bar:
        results["machine"] = machine(task.test.pixels.device)
        bar.set_description("pre-training")
        pretrained = pretrain(task, protocol, bar.update)
        for method in methods:
            bar.set_description(METHODS[method])
            results["methods"][method] = measure_method(method, seeds, pretrained, task, protocol, bar.update)
    results["weights"] = sum(param.numel() for param in pretrained.parameters())
    results["seconds"] = round(time.perf_counter() - start, 1)
    return results


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Use one CPU thread: the same numbers on any number of cores, and the model is too small to gain from two.

    Forward and backward of 16 images: 7 ms on one thread, 10 ms on two of a quiet machine with two cores, and tens of
    times that where other programs keep one of them busy.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure_method(
    method: str, seeds: int, pretrained: torch.nn.Module, task: Task, protocol: Protocol, tick: Callable[[], object]
) -> dict:
    """Choose a method's learning rate on the validation images, then score it on the test images."""

    def runs(lr: float, first_seed: int, count: int, held_out: Images, evaluations: int) -> list[Run]:
        return [
            fine_tune(method, pretrained, task, protocol, lr, seed, held_out, evaluations, tick)
            for seed in range(first_seed, first_seed + count)
        ]

    validation = {
        lr: statistics.mean(
            tried.accuracy[-1] for tried in runs(lr, TUNING_SEED, protocol.tuning_seeds, task.validation, 1)
        )
        for lr in protocol.learning_rates
    }
    best = max(validation, key=validation.get)
    reported = runs(best, 0, seeds, task.test, protocol.evaluations)
    return {
        "implementation": reported[0].impl,
        "validation": {f"{lr:g}": score for lr, score in validation.items()},
        "lr": best,
        "accuracy": [each.accuracy[-1] for each in reported],
        "step_ms": [each.step_ms for each in reported],
        "evaluated_at": reported[0].at,
        "curves": [each.accuracy for each in reported],
    }


def paired(results: dict, method: str) -> list[float] | None:
    """Return a method's accuracy minus vanilla's, seed by seed, or None where there is nothing to compare."""
    scores = results["methods"]
    if method == "vanilla" or "vanilla" not in scores:
        return None
    return [a - b for a, b in zip(scores[method]["accuracy"], scores["vanilla"]["accuracy"], strict=True)]


def verdict(differences: list[float]) -> str:
    """Judge paired differences by their 95 % interval (Student's t)."""
    from scipy.stats import t

    n, mean = len(differences), statistics.mean(differences)
    half = t.ppf(0.975, n - 1) * statistics.stdev(differences) / n**0.5
    word = "no difference from vanilla is shown"
    if abs(mean) > half:
        word = f"{'above' if mean > 0 else 'below'} vanilla here, beyond the spread of these seeds"
    return f"{word} ({mean:+.1f} points, 95 % interval {mean - half:+.1f} to {mean + half:+.1f}, {n} seeds)."


def with_spread(values: list[float], form: str, divisor: float) -> str:
    """Say a mean, and after it the standard deviation over ``divisor`` where there are several values."""
    spread = f" ± {statistics.stdev(values) / divisor:.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def plot(results: dict, path: Path) -> None:
    """Draw held-out accuracy against steps: mean, and one sample standard deviation either side."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4.5), layout="constrained")).add_subplot()
    for method, scores in results["methods"].items():
        curves = torch.tensor(scores["curves"])  # [seeds, evaluations]
        mean, spread = curves.mean(dim=0), curves.std(dim=0) if len(curves) > 1 else torch.zeros(curves.shape[1])
        (line,) = axes.plot(scores["evaluated_at"], mean, label=f"{METHODS[method]}, lr {scores['lr']:g}")
        axes.fill_between(scores["evaluated_at"], mean - spread, mean + spread, color=line.get_color(), alpha=0.15)
    axes.set_xlabel("step")
    axes.set_ylabel("accuracy on the test images, %")
    labels = results["protocol"]["train_images"]
    axes.set_title(f"Digits 5-9 from {labels} labels: mean ± standard deviation of {results['seeds']} seeds")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)
