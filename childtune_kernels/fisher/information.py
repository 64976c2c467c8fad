"""Fisher: what `estimate_fisher` returns, and which child networks follow from it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from ..files import Envelope, reading, write
from ..mask import ChildMask
from ..names import listed
from ..selection import select_words

_FORMAT, _VERSION = "childtune_kernels.Fisher", "2"


class Fisher:
    """The empirical diagonal Fisher information (Eq. 10), by parameter name.

    Args:
        sums: name -> sum over terms, parameter-shaped, float32 or float64.
        count: how many terms: examples for rule "exact", batches otherwise.
        rule: of `estimate_fisher`.
        notes: name -> how the parameter was treated, for `report`.
        backbone: the names of the pretrained part; None: all.
    """

    def __init__(
        self,
        sums: Mapping[str, Tensor],
        count: int,
        *,
        rule: str = "exact",
        notes: Mapping[str, str] | None = None,
        backbone: Iterable[str] | None = None,
    ):
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        self.sums = dict(sums)
        self.count = count
        self.rule = rule
        self.notes = dict(notes or {})
        self.backbone = list(self.sums if backbone is None else backbone)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, mean over the terms), parameter-shaped."""
        return ((name, total / self.count) for name, total in self.sums.items())

    def __getitem__(self, name: str) -> Tensor:
        return self.sums[name] / self.count

    def __iter__(self) -> Iterator[str]:
        return iter(self.sums)

    def __len__(self) -> int:
        return len(self.sums)

    def top(self, p: float, *, scope="backbone", per_tensor: bool = False) -> ChildMask:
        """Return the child network of the paper: the round(p N) weights with the highest information.

        Args:
            p: share, in (0, 1].
            scope: "backbone": the pretrained part, so that a fresh head is trained fully; "all"; "released": names
                that contain "layer", as the released code; or a function of the name, or the names themselves.
            per_tensor: take the share of each tensor, not of all together.

        Raises:
            ValueError: ``p`` or ``scope`` out of range, no parameter in scope, NaN.
        """
        return _child(self.scores(scope), p, per_tensor=per_tensor)

    def bottom(self, p: float, *, scope="backbone", per_tensor: bool = False) -> ChildMask:
        """Return the share p with the lowest information (Table 5's "Lowest Info."); see `top`."""
        return _child(self.scores(scope), p, lowest=True, per_tensor=per_tensor)

    def scores(self, scope: str | Callable[[str], bool] | Iterable[str] = "backbone") -> dict[str, Tensor]:
        """Return name -> sum, float32, for the parameters in scope: what `top` and `bottom` order."""
        if callable(scope):
            names = [name for name in self.sums if scope(name)]
        elif isinstance(scope, str):
            named = {
                "backbone": self.backbone,
                "all": list(self.sums),
                "released": [name for name in self.sums if "layer" in name],
            }
            if scope not in named:
                raise ValueError(f"scope must be one of {sorted(named)}, names or a function of them, got {scope!r}")
            names = named[scope]
        else:
            names = list(scope)
            if unknown := [name for name in names if name not in self.sums]:
                raise ValueError(f"scope must name parameters of this Fisher information, got {unknown}")
        if not names:
            raise ValueError(f"scope must hold at least one of the {len(self)} parameters, got {scope!r}")
        return {name: self.sums[name].float() for name in names}

    def report(self) -> str:
        """Return a table: by which rule each parameter was estimated, and its share of the information."""
        total = sum(float(value.sum()) for value in self.sums.values()) or 1.0
        width = max(map(len, self.sums))
        lines = [f"{'parameter':{width}} {'weights':>12} {'share':>8}  how"]
        for name, value in self.sums.items():
            share = float(value.sum()) / total
            lines.append(f"{name:{width}} {value.numel():>12,} {share:>8.2%}  {self.notes.get(name, '')}")
        unit = "examples" if self.rule == "exact" else "batches"
        return "\n".join([*lines, f"rule {self.rule!r}, {self.count:,} {unit}"])

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file; a file at ``path`` is replaced at once or not at all."""
        about = {"count": str(self.count), "rule": self.rule}
        about |= {"notes": json.dumps(self.notes), "backbone": json.dumps(self.backbone)}
        write(path, _FORMAT, _VERSION, about, self.sums)

    @classmethod
    def load(cls, path: str | os.PathLike, device: torch.device | str = "cpu") -> Fisher:
        """Read what `save` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file holds something else, another version, or bytes that its digest does not fit.
        """
        with reading(path, _FORMAT, ("1", _VERSION)) as file:
            fisher = cls._of_file(file)
        fisher.sums = {name: total.to(device) for name, total in fisher.sums.items()}
        return fisher

    @classmethod
    def _of_file(cls, file: Envelope) -> Fisher:
        about = {key: file.about[key] for key in ("count", "rule", "notes", "backbone")}
        if unknown := sorted(file.about.keys() - about.keys() - {"format", "version", "file_digest"}):
            raise ValueError(f"unknown metadata: {listed(unknown)}")
        notes, backbone = json.loads(about["notes"]), json.loads(about["backbone"])
        if not isinstance(notes, dict) or not isinstance(backbone, list):
            raise ValueError("notes and backbone of other kinds")
        order = dict.fromkeys([*notes, *file.tensors] if file.version == "1" else file.tensors)
        sums = {name: file.tensors[name] for name in order}
        return cls(sums, int(about["count"]), rule=about["rule"], notes=notes, backbone=backbone)


def _child(scores: dict[str, Tensor], p: float, **options) -> ChildMask:
    return ChildMask(select_words(scores, p, **options), {name: tensor.shape for name, tensor in scores.items()})
