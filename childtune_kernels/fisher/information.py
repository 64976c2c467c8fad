"""Fisher: what `estimate_fisher` returns, and which child networks follow from it."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from ..files import Envelope, reading, write
from ..mask import ChildMask
from ..names import listed, matching
from ..selection import select_words

_FORMAT, _VERSION = "childtune_kernels.Fisher", "2"
_MUCH_OF_CHILD, _MUCH_OF_ALL = 0.10, 0.01  # trained fully beside a child: more than these shares is worth a warning


class Fisher:
    """The empirical diagonal Fisher information (Eq. 10), by parameter name.

    Args:
        sums: name -> sum over terms, parameter-shaped, float32 or float64.
        count: how many terms: examples for rule "exact", batches otherwise.
        rule: of `estimate_fisher`.
        notes: name -> how the parameter was treated, for `report`.
        backbone: the names of the pretrained part; None: all.
        left_out: name -> weights of what trains but was not estimated; no mask names it, so it is trained fully.
    """

    def __init__(
        self,
        sums: Mapping[str, Tensor],
        count: int,
        *,
        rule: str = "exact",
        notes: Mapping[str, str] | None = None,
        backbone: Iterable[str] | None = None,
        left_out: Mapping[str, int] | None = None,
    ):
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        self.sums = dict(sums)
        self.count = count
        self.rule = rule
        self.notes = dict(notes or {})
        self.backbone = list(self.sums if backbone is None else backbone)
        self.left_out = dict(left_out or {})
        if unknown := [name for name in self.backbone if name not in self.sums]:
            raise ValueError(f"backbone must name parameters in sums, got {listed(unknown)}")

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, mean over the terms), parameter-shaped."""
        return ((name, total / self.count) for name, total in self.sums.items())

    def __getitem__(self, name: str) -> Tensor:
        return self.sums[name] / self.count

    def __iter__(self) -> Iterator[str]:
        return iter(self.sums)

    def __len__(self) -> int:
        return len(self.sums)

    def top(self, p: float, *, scope: Callable[[str], bool] | None = "backbone", per_tensor: bool = False) -> ChildMask:
        """Return the child network of the paper: the round(p N) weights with the highest information.

        Warns of tensors in scope that have no information at all, and where what is trained fully, being outside the
        scope, is more than 10 % of the child or 1 % of all weights.

        Args:
            p: share, in (0, 1].
            scope: "backbone": the pretrained part, so that a fresh head is trained fully (a pretrained output
                embedding is no fresh head; of PEFT's, the adapters); "all"; "released": names that contain "layer",
                as the released code; or a function of the name, or the names themselves.
            per_tensor: take the share of each tensor, not of all together.

        Raises:
            ValueError: ``p`` or ``scope`` out of range, no parameter in scope, NaN.
        """
        return self._child(p, scope, lowest=False, per_tensor=per_tensor)

    def bottom(
        self, p: float, *, scope: Callable[[str], bool] | None = "backbone", per_tensor: bool = False
    ) -> ChildMask:
        """Return the share p with the lowest information (Table 5's "Lowest Info."); see `top`."""
        return self._child(p, scope, lowest=True, per_tensor=per_tensor)

    def _child(self, p: float, scope: Callable[[str], bool] | None, lowest: bool, per_tensor: bool) -> ChildMask:
        scores = self.scores(scope)
        words = select_words(scores, p, lowest=lowest, per_tensor=per_tensor)
        mask = ChildMask(words, {name: score.shape for name, score in scores.items()})
        for warning in (_about_blanks(scores, mask), self._about_full_training(mask)):
            if warning:
                warnings.warn(warning, stacklevel=3)
        return mask

    def _about_full_training(self, mask: ChildMask) -> str:
        """Say what is trained fully beside the child, where that is much."""
        full = self._trained_fully(mask)
        weights, child = sum(full.values()), mask.count()
        masked = sum(self.sums[name].numel() for name in mask)
        if weights <= min(_MUCH_OF_CHILD * child, _MUCH_OF_ALL * (masked + weights)):
            return ""
        return (
            f"outside the scope {weights:,} weights are trained fully, beside a child of {child:,}: {_sized(full)}; "
            "to mask them too, have them estimated and in the scope, as scope='all' does"
        )

    def _trained_fully(self, masked: Iterable[str]) -> dict[str, int]:
        """Return name -> weights of what a mask of the given names leaves to full training."""
        masked = set(masked)
        return {name: total.numel() for name, total in self.sums.items() if name not in masked} | self.left_out

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
            found = {name: matching(name, self.sums) for name in scope}
            if unknown := [name for name, match in found.items() if match is None]:
                raise ValueError(f"scope must name parameters of this Fisher information, got {listed(unknown)}")
            names = list(dict.fromkeys(found.values()))
        if not names:
            got = repr(scope) if isinstance(scope, str) else "a function or names that hold none"
            raise ValueError(
                f"scope must hold at least one of the {len(self)} parameters, got {got}: "
                f"they are {listed(list(self.sums))}"
            )
        return {name: self.sums[name].float() for name in names}

    def report(self) -> str:
        """Return a table: by which rule each parameter was estimated, its share of the information, and its part.

        The part is "masked" or "whole" (trained fully) in the default scope; below, what each part adds up to.
        """
        total = sum(float(value.sum()) for value in self.sums.values()) or 1.0
        width = max(map(len, self.sums))
        masked = set(self.backbone)
        lines = [f"{'parameter':{width}} {'weights':>12} {'share':>8}  {'part':6}  how"]
        for name, value in self.sums.items():
            share, part = float(value.sum()) / total, "masked" if name in masked else "whole"
            note = self.notes.get(name, "")
            lines.append(f"{name:{width}} {value.numel():>12,} {share:>8.2%}  {part:6}  {note}")
        unit = "examples" if self.rule == "exact" else "batches"
        lines.append(f"rule {self.rule!r}, {self.count:,} {unit}")
        sizes = {name: self.sums[name].numel() for name in self.backbone}
        full = self._trained_fully(masked)
        for title, part in (("masked in the default scope", sizes), ("trained fully", full)):
            share = sum(float(self.sums[name].sum()) for name in part if name in self.sums) / total
            lines.append(
                f"{title}: {len(part)} tensors, {sum(part.values()):,} weights, {share:.2%} of the information"
            )
        if full:
            lines.append(f"the largest of these: {_sized(full)}")
        if self.left_out:
            lines.append(f"of these not estimated: {_sized(self.left_out)}")
        if blank := [name for name, value in self.sums.items() if value.numel() and not value.any()]:
            lines.append(f"without any information: {listed(blank)}")
        return "\n".join(lines)

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file; a file at ``path`` is replaced at once or not at all."""
        about = {"count": str(self.count), "rule": self.rule}
        about |= {key: json.dumps(getattr(self, key)) for key in ("notes", "backbone", "left_out")}
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
        about["left_out"] = "{}" if file.version == "1" else file.about["left_out"]
        if unknown := sorted(file.about.keys() - about.keys() - {"format", "version", "file_digest"}):
            raise ValueError(f"unknown metadata: {listed(unknown)}")
        lists = {key: json.loads(about[key]) for key in ("notes", "backbone", "left_out")}
        notes = lists["notes"]
        if [type(value) for value in lists.values()] != [dict, list, dict]:
            raise ValueError("notes, backbone or left_out of other kinds")
        order = dict.fromkeys([*notes, *file.tensors] if file.version == "1" else file.tensors)
        sums = {name: file.tensors[name] for name in order}
        return cls(sums, int(about["count"]), rule=about["rule"], **lists)


def _about_blanks(scores: dict[str, Tensor], mask: ChildMask) -> str:
    """Say which tensors have no information, which no order of theirs can follow, unless the child takes them whole."""
    blank = [name for name, score in scores.items() if score.numel() and not score.any()]
    sizes = {name: scores[name].numel() for name in blank}
    kept = {name: mask.count(name) for name in blank}
    if kept == sizes:
        return ""
    return (
        f"no information at all in {listed(blank)}: of these {sum(sizes.values()):,} weights "
        f"{sum(kept.values()):,} are in the child, the first ones, and all others frozen. LoRA's A is such a tensor at "
        "its usual start, where B is 0: train a few steps before the estimate, or take the share of each tensor "
        "with per_tensor=True"
    )


def _sized(weights: Mapping[str, int]) -> str:
    """Return the names, the largest first, each with its number of weights."""
    order = sorted(weights, key=weights.get, reverse=True)
    return listed([f"{name} ({weights[name]:,})" for name in order])
