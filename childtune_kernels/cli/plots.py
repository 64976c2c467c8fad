"""Pictures of child networks: how much they overlap, and where in a model they lie. They need matplotlib."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .. import ChildMask

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a part of the name between dots


def jaccard_heat_map(matrix: Tensor, labels: Sequence[str], path: Path) -> None:
    """Draw the overlap of every two child networks, as the paper's Fig. 3 does.

    Args:
        matrix: float64 [n, n], from `jaccard_matrix`.
        labels: n names.
        path: the file to write; its suffix says which kind.
    """
    from matplotlib.figure import Figure

    side = 2.5 + 0.6 * len(labels)
    axes = (figure := Figure(figsize=(side + 1, side), layout="constrained")).add_subplot()
    image = axes.imshow(matrix.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(labels)), labels)
    for row, values in enumerate(matrix.tolist()):
        for column, value in enumerate(values):
            color = "white" if value > 0.6 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color)
    axes.set_title("Overlap of child networks (Jaccard)")
    figure.colorbar(image)
    figure.savefig(path, dpi=150)


def layers_and_kinds(names: Iterable[str]) -> dict[str, tuple[str, int | None]]:
    """Return each parameter's kind, its name with the layer's number replaced by ``*``, and that number.

    The first number between dots is the layer's; names without one are their own kind, of layer None.
    """
    found = {}
    for name in names:
        match = _NUMBER.search(name)
        found[name] = (_NUMBER.sub("*", name, count=1), int(match[0])) if match else (name, None)
    return found


def density_table(mask: ChildMask, names: Iterable[str]) -> tuple[Tensor, list[str], list[int | None]]:
    """Return the density of every kind of tensor in every layer.

    Returns:
        float64 [kinds, layers], NaN where a layer has no such tensor; the kinds, in the order of ``names``; the
        layers, None (no layer) first.
    """
    places = layers_and_kinds(names)
    kinds = list(dict.fromkeys(kind for kind, _ in places.values()))
    layers = sorted({layer for _, layer in places.values()}, key=lambda layer: -1 if layer is None else layer)
    table = torch.full((len(kinds), len(layers)), torch.nan, dtype=torch.float64)
    for name, (kind, layer) in places.items():
        table[kinds.index(kind), layers.index(layer)] = mask.density(name)
    return table, kinds, layers


def density_by_layer(masks: Mapping[str, ChildMask], path: Path) -> None:
    """Draw which share of each layer's tensors is in the child, one panel a mask.

    Args:
        masks: label -> mask; at least one, all of one model.
        path: the file to write; its suffix says which kind.
    """
    from matplotlib.figure import Figure

    names = list(next(iter(masks.values())))  # one order for all: the panels share their axis of kinds
    tables = {label: density_table(mask, names) for label, mask in masks.items()}
    _, kinds, layers = next(iter(tables.values()))
    size = (5 + len(tables) * (1 + 0.3 * len(layers)), 2 + 0.3 * len(kinds))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(tables), squeeze=False, sharey=True)[0]
    for axes, (label, (table, _, _)) in zip(panels, tables.items(), strict=True):
        image = axes.imshow(table.numpy(), cmap="viridis", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(layers)), ["none" if layer is None else str(layer) for layer in layers])
        axes.set_yticks(range(len(kinds)), kinds)
        axes.set_xlabel("layer")
        axes.set_title(label)
    figure.suptitle("Share of the weights in the child network")
    figure.colorbar(image, ax=list(panels))
    figure.savefig(path, dpi=150)
