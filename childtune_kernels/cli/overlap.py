"""`childtune overlap`: how much child networks have in common (paper, Fig. 3), read from their files."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

from torch import Tensor

from .. import ChildMask, __version__, jaccard_matrix
from . import plots
from .inputs import Results, output_file, refusing, require_apart, require_packages, write_text
from .text import Refused, markdown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `childtune overlap`."""
    parser.add_argument("masks", nargs="+", type=Path, metavar="MASK.safetensors", help="what ChildMask.save wrote")
    parser.add_argument("--per-tensor", action="store_true", help="also say it for every parameter")
    parser.add_argument("--plot", type=output_file(".png"), metavar="FILE.png", help="write a heat map of the matrix")
    parser.add_argument(
        "--density-plot", type=output_file(".png"), metavar="FILE.png", help="write each layer's densities"
    )
    parser.add_argument("--json", type=output_file(".json"), metavar="FILE.json", help="write all numbers here")


def run(args: argparse.Namespace) -> int:
    """Print sizes and overlaps and write the files asked for."""
    if args.plot or args.density_plot:
        require_packages(["matplotlib"], "'childtune_kernels[demo]'", needs="plots need")
    if len(set(args.masks)) < len(args.masks):
        raise Refused(f"each file must be given once, got {' '.join(map(str, args.masks))}")
    require_apart({"--plot": args.plot, "--density-plot": args.density_plot, "--json": args.json}, args.masks)
    masks = load(args.masks)
    matrix = jaccard_matrix(list(masks.values()))
    print("\n".join([*sizes(masks), "", *overlaps(matrix, list(masks))]))
    if args.per_tensor:
        print("\n".join(["", *tensors(masks)]))
    results = Results()
    numbers = report(args.masks, masks, matrix, args.per_tensor)
    results.keep(args.json, write_text(json.dumps(numbers, indent=1) + "\n"))
    results.keep(args.plot, lambda path: plots.jaccard_heat_map(matrix, list(masks), path))
    results.keep(args.density_plot, lambda path: plots.density_by_layer(masks, path))
    results.close()
    return 0


def load(paths: Sequence[Path]) -> dict[str, ChildMask]:
    """Read masks of one model, by their files' names without suffix, or by whole paths where two would be the same.

    Raises:
        Refused: naming the file that cannot be read or is of another model than the first.
    """
    stems = [path.stem for path in paths]
    labels = stems if len(set(stems)) == len(stems) else [str(path) for path in paths]
    masks: dict[str, ChildMask] = {}
    for label, path in zip(labels, paths, strict=True):
        with refusing(path):
            masks[label] = ChildMask.load(path)
        try:
            masks[labels[0]].check(masks[label])
        except ValueError as error:
            raise Refused(f"{path} must be of the same model as {paths[0]}: {error}") from error
    return masks


def sizes(masks: Mapping[str, ChildMask]) -> list[str]:
    """Return a table of what each mask holds."""
    rows = [["child network", "parameters", "weights", "density", "digest"]]
    for label, mask in masks.items():
        rows.append([label, f"{len(mask)}", f"{mask.count():,}", f"{mask.density():.4f}", mask.digest()])
    return markdown(rows)


def overlaps(matrix: Tensor, labels: Sequence[str]) -> list[str]:
    """Return the matrix as a table."""
    rows = [[label, *(f"{value:.4f}" for value in row)] for label, row in zip(labels, matrix.tolist(), strict=True)]
    return markdown([["Jaccard", *labels], *rows])


def tensors(masks: Mapping[str, ChildMask]) -> list[str]:
    """Return a table of each parameter's densities and, of several masks, the mean overlap of every two."""
    several = len(masks) > 1
    rows = [["parameter", *(f"density of {label}" for label in masks), *(["mean Jaccard"] if several else [])]]
    for name, values in per_tensor(masks).items():
        mean = [f"{statistics.mean(values['jaccard']):.4f}"] if several else []
        rows.append([name, *(f"{density:.4f}" for density in values["density"]), *mean])
    return markdown(rows)


def per_tensor(masks: Mapping[str, ChildMask]) -> dict[str, dict[str, list[float]]]:
    """Return each parameter's ``density``, one a mask, and ``jaccard``, one a pair (0, 1), (0, 2), ..., (1, 2), ..."""
    every = list(masks.values())
    return {
        name: {
            "density": [mask.density(name) for mask in every],
            "jaccard": [a.jaccard(b, name) for a, b in combinations(every, 2)],
        }
        for name in every[0]
    }


def report(paths: Sequence[Path], masks: Mapping[str, ChildMask], matrix: Tensor, every_tensor: bool) -> dict:
    """Return everything that was found, as plain values."""
    found = {
        "childtune_kernels": __version__,
        "masks": [
            {
                "label": label,
                "file": str(path),
                "digest": mask.digest(),
                "parameters": len(mask),
                "weights": mask.count(),
                "density": mask.density(),
            }
            for path, (label, mask) in zip(paths, masks.items(), strict=True)
        ],
        "jaccard": matrix.tolist(),
    }
    return found | ({"per_tensor": per_tensor(masks)} if every_tensor else {})
