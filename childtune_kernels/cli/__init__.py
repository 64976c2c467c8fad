"""The `childtune` command. Each sub-command is a module here with `add_arguments(parser)` and `run(args) -> int`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__

COMMANDS = {
    "demo": "compare vanilla AdamW with Child-Tuning on real images with few labels, in minutes on a CPU",
    "doctor": "say which implementations work here, and check them against the reference",
    "bench": "measure the optimizer step",
    "plan": "say how much memory a model takes to train, by method",
    "fisher": "choose the child network of a Hugging Face checkpoint for a task, by exact Fisher information",
    "delta": "keep what fine-tuning changed as a file of its own, and put it back",
    "overlap": "say how much child networks have in common, from their files",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return its exit code; only that sub-command's module is imported."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="childtune", description="Child-Tuning as fused kernels behind AdamW.")
    parser.add_argument("--version", action="version", version=f"childtune_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if argv[:1] == [name]:
            import_module(f".{name}", __name__).add_arguments(command)
    args = parser.parse_args(argv)
    return import_module(f".{args.command}", __name__).run(args)
