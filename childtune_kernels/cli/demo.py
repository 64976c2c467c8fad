"""`childtune demo`: vanilla AdamW, Child-Tuning_F and Child-Tuning_D on real images with few labels, in one table."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from .. import __version__, ops
from ..experiments.digits import METHODS, TUNING_SEED, Images, Protocol, Task, fine_tune, load_task, pretrain
from ..measure.timing import machine
from .inputs import Results, device, output_file, require_apart, require_packages, whole, write_text
from .text import markdown

PROTOCOL = Protocol()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `childtune demo`."""
    parser.add_argument("--seeds", type=whole(1), default=5, metavar="N", help="reported seeds")
    parser.add_argument(
        "--methods",
        type=_methods,
        default=tuple(METHODS),
        metavar="LIST",
        help=f"any of {','.join(METHODS)}, separated by commas (default: all)",
    )
    parser.add_argument("--device", type=device, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--plot", type=output_file(".png"), metavar="FILE.png", help="write the learning curves here")
    parser.add_argument("--json", type=output_file(".json"), metavar="FILE.json", help="write all numbers here")


def run(args: argparse.Namespace) -> int:
    """Run the experiment and print its protocol, its table and what the table shows."""
    needed = ["sklearn", "scipy", "tqdm", *(["matplotlib"] if args.plot else [])]
    require_packages(needed, "'childtune_kernels[demo]'")
    require_apart({"--json": args.json, "--plot": args.plot}, [])
    task = load_task(PROTOCOL, torch.device(args.device))
    print("\n".join(describe(PROTOCOL, task, args.seeds)), end="\n\n", flush=True)
    results = experiment(args.methods, args.seeds, task, PROTOCOL)
    print("\n".join([*table(results), "", *conclusions(results)]))
    files = Results()
    files.keep(args.json, write_text(json.dumps(results, indent=1) + "\n"))
    files.keep(args.plot, lambda path: plot(results, path))
    files.close()
    return 0


def describe(protocol: Protocol, task: Task, seeds: int) -> list[str]:
    """Say what is about to be run, and by what if that is slow."""
    device_type = task.test.pixels.device.type
    slow = []
    if ops.implementation("auto", device_type).NAME == "reference":
        slow = [f"Several times slower than it could be: {ops.unavailable('csrc', device_type)}."]
    sizes = [len(split.labels) for split in task]
    rates = ", ".join(f"{lr:g}" for lr in protocol.learning_rates)
    epochs = protocol.steps * protocol.batch_size / protocol.train_images
    return [
        f"Data: handwritten digits, 8 x 8 pixels. A four-layer transformer, pre-trained on {sizes[0]} images of 0-4, "
        f"learns 5-9 with a fresh head",
        f"from {protocol.train_images} labelled images, which each seed draws from {sizes[1]}: {protocol.steps} steps "
        f"of {protocol.batch_size} images ({epochs:.0f} epochs; F and D start slower), p_F = p_D = {protocol.share}.",
        f"Learning rate: for each method the best of {rates} on {sizes[2]} validation images, over "
        f"{protocol.tuning_seeds} other seeds.",
        f"Score: accuracy on {sizes[3]} test images that chose nothing; seeds: {seeds}, the same images, head and "
        f"order for every method.",
        *slow,
    ]


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
    with _one_thread(), tqdm(total=total, unit="step", leave=False, disable=None) as bar:
        results["machine"] = machine(task.test.pixels.device)
        bar.set_description("pre-training")
        pretrained = pretrain(task, protocol, bar.update)
        for method in methods:
            bar.set_description(METHODS[method])
            results["methods"][method] = _measure(method, seeds, pretrained, task, protocol, bar.update)
    results["weights"] = sum(param.numel() for param in pretrained.parameters())
    results["seconds"] = round(time.perf_counter() - start, 1)
    return results


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
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


def _measure(
    method: str, seeds: int, pretrained: torch.nn.Module, task: Task, protocol: Protocol, tick: Callable[[], object]
) -> dict:
    """Choose a method's learning rate on the validation images, then score it on the test images."""

    def runs(lr: float, first_seed: int, count: int, held_out: Images, evaluations: int) -> list:
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


def table(results: dict) -> list[str]:
    """Return the table as lines of Markdown."""
    header = ["method", "lr", "accuracy, %", "min .. max", "minus vanilla", "optimizer, ms/step", "implementation"]
    rows = [header]
    for method, scores in results["methods"].items():
        accuracy = scores["accuracy"]
        differences = paired(results, method)
        rows.append(
            [
                METHODS[method],
                f"{scores['lr']:g}",
                _with_spread(accuracy, ".1f", 1),
                f"{min(accuracy):.1f} .. {max(accuracy):.1f}",
                "" if differences is None else _with_spread(differences, "+.1f", len(differences) ** 0.5),
                f"{statistics.median(scores['step_ms']):.2f}",
                scores["implementation"],
            ]
        )
    return markdown(rows)


def _with_spread(values: list[float], form: str, divisor: float) -> str:
    spread = f" ± {statistics.stdev(values) / divisor:.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def conclusions(results: dict) -> list[str]:
    """Say in words what the numbers show, and what they do not."""
    if results["seeds"] == 1:
        lines = ["One seed has no spread: nothing follows about which method is better."]
    else:
        lines = ["± is the sample standard deviation over seeds; of differences, seed by seed, the standard error."]
        lines += [f"{METHODS[m]}: {_verdict(d)}" for m in results["methods"] if (d := paired(results, m)) is not None]
        lines.append("One small data set: none of this says how the methods compare elsewhere.")
    early = {METHODS[m]: statistics.mean(c[0] for c in s["curves"]) for m, s in results["methods"].items()}
    at, steps = next(iter(results["methods"].values()))["evaluated_at"][0], results["protocol"]["steps"]
    lines.append(f"After {at} of the {steps} steps: {', '.join(f'{m} {mean:.1f} %' for m, mean in early.items())}.")
    lines.append(
        f"With {results['weights']:,} weights a step's time is the cost of calls, not of data: "
        f"`childtune bench` measures real sizes."
    )
    where = results["machine"]
    lines.append(f"Took {results['seconds']:.0f} s on {where['device']}, CPU threads: {where['threads']}.")
    return lines


def _verdict(differences: list[float]) -> str:
    """Judge paired differences by their 95 % interval (Student's t)."""
    from scipy.stats import t

    n, mean = len(differences), statistics.mean(differences)
    half = t.ppf(0.975, n - 1) * statistics.stdev(differences) / n**0.5
    word = "no difference from vanilla is shown"
    if abs(mean) > half:
        word = f"{'above' if mean > 0 else 'below'} vanilla here, beyond the spread of these seeds"
    return f"{word} ({mean:+.1f} points, 95 % interval {mean - half:+.1f} to {mean + half:+.1f}, {n} seeds)."


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


def _methods(text: str) -> tuple[str, ...]:
    known = {method.lower(): method for method in METHODS}
    methods = tuple(known.get(word.strip().lower()) for word in text.split(","))
    if None in methods or len(set(methods)) < len(methods):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(METHODS)}, each once, got {text!r}")
    return methods
