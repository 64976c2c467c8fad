"""`childtune memory`: the memory that training a model takes, by method, before anything is allocated."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from ..measure.results import DTYPES
from ..measure.shapes import SHAPES
from ..optim.memory import Memory, predict
from .inputs import model_folder, quiet_transformers, read_text, refusing, require_packages, share
from .text import Refused, markdown, size

KINDS = ("weights", "gradients", "moments", "companions", "indices", "total")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `childtune memory`."""
    of = parser.add_mutually_exclusive_group(required=True)
    of.add_argument("--model", choices=SHAPES, help="parameter shapes that this package knows")
    of.add_argument("--config", type=Path, metavar="FOLDER", help="a model's, with its config.json")
    of.add_argument("--shapes", type=Path, metavar="FILE.json", help="an object: parameter name -> list of sizes")
    parser.add_argument("--p", type=share, default=0.1, help="the child's share, for D")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of weights and gradients")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    shapes = shapes_of(args)
    rows = methods(shapes, args.p, DTYPES[args.dtype])
    weights = next(iter(rows.values())).parameters
    print(f"{weights:,} weights in {len(shapes)} tensors, {args.dtype}; bytes a weight, without activations")
    table = [["", *KINDS, "in all"]]
    for name, memory in rows.items():
        shares = memory.per_parameter()
        table.append([name, *(f"{shares[kind]:.2f}" for kind in KINDS), size(memory.total)])
    print("\n".join(markdown(table)))
    return 0


def methods(shapes: dict[str, tuple[int, ...]], p: float, dtype: torch.dtype) -> dict[str, Memory]:
    """Return what each way to train takes."""
    low = dtype != torch.float32
    rows = {"AdamW, fp32 moments": predict(shapes, weight_dtype=dtype)}
    if low:
        rows["AdamW, fp32 moments and masters"] = predict(shapes, weight_dtype=dtype, low_precision="master")
    rows["F"] = predict(shapes, weight_dtype=dtype, low_precision="stochastic")
    rows["F, fused_backward"] = predict(shapes, weight_dtype=dtype, low_precision="stochastic", fused_backward=True)
    rows[f"D p={p:g}, state='dense'"] = predict(shapes, weight_dtype=dtype, p=p, state="dense")
    rows[f"D p={p:g}"] = predict(shapes, weight_dtype=dtype, p=p)
    rows[f"D p={p:g}, pack_gradients"] = predict(shapes, weight_dtype=dtype, p=p, pack_gradients=True)
    rows[f"D p={p:g}, fused_backward"] = predict(shapes, weight_dtype=dtype, p=p, fused_backward=True)
    return rows


def shapes_of(args: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """Return name -> shape, from whichever source was given; none is looked for on the network."""
    if args.model:
        return {str(i): shape for i, shape in enumerate(SHAPES[args.model]())}
    if args.shapes:
        text = read_text(args.shapes)
        with refusing(args.shapes):
            found = json.loads(text)
        if not isinstance(found, dict) or not found or not all(map(_is_shape, found.values())):
            raise Refused(f"{args.shapes} must hold an object of parameter name -> list of sizes")
        return {name: tuple(shape) for name, shape in found.items()}
    model_folder(args.config, "--config")
    require_packages(["transformers"], "transformers")
    quiet_transformers()
    import transformers

    with refusing(args.config), torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(args.config, local_files_only=True, trust_remote_code=False)
        names = getattr(config, "architectures", None) or ["AutoModel"]
        build = getattr(transformers, names[0], transformers.AutoModel)
        model = build(config) if build is not transformers.AutoModel else build.from_config(config)
    return {name: tuple(param.shape) for name, param in model.named_parameters()}


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)
