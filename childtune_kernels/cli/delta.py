"""`childtune delta`: make, apply, revert and describe what fine-tuning changed, on safetensors files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from torch import Tensor

from .. import ChildDelta, replacing
from ._text import output_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the four actions of `childtune delta`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    models = {
        "make": (("base", "tuned"), "write what turns one model into the other"),
        "apply": (("base", "delta"), "write the tuned model"),
        "revert": (("tuned", "delta", "base"), "write the base again, from the tuned model"),
        "info": (("delta",), "describe a delta"),
    }
    for name, (inputs, summary) in models.items():
        action = actions.add_parser(name, help=summary, description=summary)
        for given in inputs:
            what = "what ChildDelta.save wrote" if given == "delta" else "a .safetensors file, or a folder with one"
            action.add_argument(given, type=Path, metavar=given.upper(), help=what)
        if name != "info":
            action.add_argument("-o", "--output", type=output_file(".safetensors"), required=True, metavar="FILE")


def run(args: argparse.Namespace) -> int:
    """Do one action; return 1, with one line of why, where that fails. Nothing is written then."""
    from safetensors import SafetensorError

    try:
        _ACTIONS[args.action](args)
    except (OSError, ValueError, SafetensorError) as error:
        print(f"childtune delta: {error}", file=sys.stderr)
        return 1
    return 0


def _make(args: argparse.Namespace) -> None:
    delta = ChildDelta.from_models(load(args.base)[0], load(args.tuned)[0])
    delta.save(args.output)
    print(delta)


def _apply(args: argparse.Namespace) -> None:
    state, metadata = load(args.base)
    ChildDelta.load(args.delta).apply_(state)
    save(state, metadata, args.output)


def _revert(args: argparse.Namespace) -> None:
    state, metadata = load(args.tuned)
    ChildDelta.load(args.delta).revert_(state, load(args.base)[0])
    save(state, metadata, args.output)


def _info(args: argparse.Namespace) -> None:
    delta = ChildDelta.load(args.delta)
    print(delta)
    for name in delta.mask:
        print(f"{name}: {delta.mask.count(name):,} of {delta.mask.shape(name).numel():,} values")
    for name, tensor in delta.dense.items():
        print(f"{name}: {'new' if name in delta.added else 'all'} {tensor.numel():,} values")


_ACTIONS = {"make": _make, "apply": _apply, "revert": _revert, "info": _info}


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a model's tensors and the file's metadata.

    Raises:
        ValueError: a folder has no model.safetensors; shards are not joined here.
    """
    from safetensors import safe_open

    if path.is_dir():
        path = path / "model.safetensors"
        if not path.exists():
            raise ValueError(f"{path.parent} must hold model.safetensors, a single file")
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def save(state: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    """Write a model's tensors, at once or not at all."""
    from safetensors.torch import save_file

    with replacing(path) as partial:
        save_file(state, partial, metadata)
