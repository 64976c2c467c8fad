"""`childtune delta`: make, apply, revert and describe what fine-tuning changed, on safetensors files."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from .. import ChildDelta, replacing
from .inputs import Results, output_file, refusing, require_apart
from .text import Refused, size


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
            action.add_argument(
                "-o",
                "--output",
                type=output_file(".safetensors"),
                required=True,
                metavar="FILE",
                help="the .safetensors file to write, none of those that are read",
            )


def run(args: argparse.Namespace) -> int:
    """Do one action; of what does not fit together nothing is written."""
    given = [getattr(args, name) for name in ("base", "tuned", "delta") if hasattr(args, name)]
    require_apart({"-o": getattr(args, "output", None)}, [model_file(path) for path in given])
    try:
        _ACTIONS[args.action](args)
    except ValueError as error:
        raise Refused(str(error)) from error
    return 0


def _make(args: argparse.Namespace) -> None:
    delta = ChildDelta.from_models(load(args.base)[0], load(args.tuned)[0])
    _keep(args.output, delta.save)
    print(delta if delta.values or delta.dense else f"the two models are equal in every bit: an empty {delta}")


def _apply(args: argparse.Namespace) -> None:
    state, metadata = load(args.base)
    _load_delta(args.delta).apply_(state)
    _write(state, metadata, args.output, "the tuned model")


def _revert(args: argparse.Namespace) -> None:
    state, metadata = load(args.tuned)
    _load_delta(args.delta).revert_(state, load(args.base)[0])
    _write(state, metadata, args.output, "the base")


def _info(args: argparse.Namespace) -> None:
    delta = _load_delta(args.delta)
    print(delta)
    for name in delta.mask:
        print(f"{name}: {delta.mask.count(name):,} of {delta.mask.shape(name).numel():,} values")
    for name, tensor in delta.dense.items():
        print(f"{name}: {'new' if name in delta.added else 'all'} {tensor.numel():,} values")


def _load_delta(path: Path) -> ChildDelta:
    with refusing(path):
        return ChildDelta.load(path)


def _write(state: dict[str, Tensor], metadata: dict[str, str], path: Path, what: str) -> None:
    _keep(path, lambda path: save(state, metadata, path))
    print(f"{path}: {what}, {len(state)} tensors, {size(sum(tensor.nbytes for tensor in state.values()))}")


def _keep(path: Path, write: Callable[[Path], object]) -> None:
    results = Results()
    results.keep(path, write)
    results.close()


_ACTIONS = {"make": _make, "apply": _apply, "revert": _revert, "info": _info}


def model_file(path: Path) -> Path:
    """Return the file that a path stands for: of a folder, its model.safetensors."""
    return path / "model.safetensors" if path.is_dir() else path


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a model's tensors and the file's metadata.

    Raises:
        Refused: the file cannot be read, or a folder has no model.safetensors; shards are not joined here.
    """
    from safetensors import safe_open

    file = model_file(path)
    if path.is_dir() and not file.exists():
        raise Refused(f"{path} must hold model.safetensors, a single file")
    with refusing(file), safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}


def save(state: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    """Write a model's tensors, at once or not at all."""
    from safetensors.torch import save_file

    with replacing(path) as partial:
        save_file(state, partial, metadata)
