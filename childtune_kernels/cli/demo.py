"""`childtune demo`: vanilla AdamW, Child-Tuning_F and Child-Tuning_D on real images with few labels, in one table."""

from __future__ import annotations

import argparse
import json
import statistics

import torch

from .. import ops
from ..experiments.compare import experiment, paired, plot, verdict, with_spread
from ..experiments.digits import Protocol, Task, load_task
from ..experiments.training import METHODS
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
                with_spread(accuracy, ".1f", 1),
                f"{min(accuracy):.1f} .. {max(accuracy):.1f}",
                "" if differences is None else with_spread(differences, "+.1f", len(differences) ** 0.5),
                f"{statistics.median(scores['step_ms']):.2f}",
                scores["implementation"],
            ]
        )
    return markdown(rows)


def conclusions(results: dict) -> list[str]:
    """Say in words what the numbers show, and what they do not."""
    if results["seeds"] == 1:
        lines = ["One seed has no spread: nothing follows about which method is better."]
    else:
        lines = ["± is the sample standard deviation over seeds; of differences, seed by seed, the standard error."]
        lines += [f"{METHODS[m]}: {verdict(d)}" for m in results["methods"] if (d := paired(results, m)) is not None]
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


def _methods(text: str) -> tuple[str, ...]:
    known = {method.lower(): method for method in METHODS}
    methods = tuple(known.get(word.strip().lower()) for word in text.split(","))
    if None in methods or len(set(methods)) < len(methods):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(METHODS)}, each once, got {text!r}")
    return methods
