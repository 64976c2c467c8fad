"""The `childtune` command. Each sub-command is a module here with `add_arguments(parser)` and `run(args) -> int`.

Exit codes: 0, it was done; 1, it failed, or found what it looked for to be wrong; 2, what was given cannot be used,
and nothing was done; 130, interrupted. What went wrong is one line on stderr; CHILDTUNE_DEBUG=1 shows the traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from .. import __version__
from .text import Failed, Refused, brief, one_line

COMMANDS = {
    "demo": "compare vanilla AdamW with Child-Tuning on real images with few labels, in minutes on a CPU",
    "doctor": "say which implementations work here and how they were built, and check them against the reference",
    "bench": "measure the optimizer step",
    "memory": "say how much memory a model takes to train, by method",
    "fisher": "choose the child network of a Hugging Face checkpoint for a task, by exact Fisher information",
    "delta": "keep what fine-tuning changed as a file of its own, and put it back",
    "overlap": "say how much child networks have in common, from their files",
}
RENAMED = {"plan": "memory"}  # old name -> new: still understood, no longer listed


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = action.default is None or action.default is False or "(default:" in (action.help or "")
        return action.help if said else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, without its usage."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=Help, **options)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {one_line(message)} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return its exit code; only that sub-command's module is imported."""
    argv = list(sys.argv[1:] if argv is None else argv)
    argv[:1] = [RENAMED.get(word, word) for word in argv[:1]]
    name = " ".join(["childtune", *(word for word in argv[:1] if word in COMMANDS)])
    with _warnings_of(name):
        return _reported(argv, name)


def _reported(argv: list[str], name: str) -> int:
    """Run, and turn what went wrong into one line and an exit code."""
    try:
        return _run(argv)
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except Exception as error:
        if os.environ.get("CHILDTUNE_DEBUG"):
            raise
        code, message = (2 if isinstance(error, Refused) else 1), _reason(error)
    print(f"{name}: {message}", file=sys.stderr)
    return code


@contextmanager
def _warnings_of(name: str) -> Iterator[None]:
    """Have warnings say who warns instead of where in the code."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *where: f"{name}: note: {one_line(message)}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def _run(argv: list[str]) -> int:
    parser = Parser(prog="childtune", description="Child-Tuning as fused kernels behind AdamW.")
    parser.add_argument("--version", action="version", version=f"childtune_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if argv[:1] == [name]:
            import_module(f".{name}", __name__).add_arguments(command)
    args = parser.parse_args(argv)
    return import_module(f".{args.command}", __name__).run(args)


def _reason(error: Exception) -> str:
    if isinstance(error, (Refused, Failed)):
        return one_line(error)
    if isinstance(error, (OSError, ValueError)):
        return brief(error)
    return f"{type(error).__name__}: {brief(error)} (CHILDTUNE_DEBUG=1 shows where)"
