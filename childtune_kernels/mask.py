"""ChildMask: a child network as packed bits, one bit a weight, by parameter name."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from . import ops

_FORMAT, _VERSION = "childtune_kernels.ChildMask", 1


class ChildMask:
    """Which weights belong to the child network (paper, sec. 2.3), for the parameters it names.

    Parameters that it does not name are trained fully, like a fresh classification head. Bit i of word w is
    element 32 * w + i in row-major order, so a mask takes one bit a weight: 42 MB for BERT-large.

    Args:
        words: name -> int32 [ceil(numel / 32)], spare bits 0.
        shapes: name -> parameter shape, the same names.

    Raises:
        ValueError: names differ, or words have another dtype or count than the shape asks for.
    """

    def __init__(self, words: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]):
        if words.keys() != shapes.keys():
            raise ValueError(
                f"words and shapes must name the same parameters, got {sorted(words.keys() ^ shapes.keys())}"
            )
        for name, packed in words.items():
            expected = (torch.Size(shapes[name]).numel() + 31) // 32
            if packed.dtype != torch.int32 or packed.shape != (expected,):
                raise ValueError(
                    f"words[{name!r}] must be int32 of shape ({expected},), "
                    f"got {packed.dtype} of shape {tuple(packed.shape)}"
                )
        self._words = dict(words)
        self._shapes = {name: torch.Size(shape) for name, shape in shapes.items()}

    @classmethod
    def from_dense(cls, dense: Mapping[str, Tensor]) -> ChildMask:
        """Pack bool tensors, one a parameter and of its shape.

        Raises:
            TypeError: a tensor is not bool.
        """
        for name, bits in dense.items():
            if not isinstance(bits, Tensor) or bits.dtype != torch.bool:
                raise TypeError(
                    f"mask of {name!r} must be a bool tensor, got {getattr(bits, 'dtype', type(bits).__name__)}"
                )
        return cls({n: ops.pack_bits(b) for n, b in dense.items()}, {n: b.shape for n, b in dense.items()})

    def to_dense(self, name: str) -> Tensor:
        """Return the bits of one parameter, bool, of its shape."""
        shape = self.shape(name)
        return ops.unpack_bits(self._words[name], shape.numel()).view(shape)

    def words(self, name: str) -> Tensor:
        """Return the packed bits of one parameter, int32 [ceil(numel / 32)]."""
        self.shape(name)
        return self._words[name]

    def shape(self, name: str) -> torch.Size:
        """Return the shape of one parameter.

        Raises:
            KeyError: the mask does not name it.
        """
        if name not in self._shapes:
            raise KeyError(f"the mask names no parameter {name!r}; it names {len(self)}")
        return self._shapes[name]

    def count(self, name: str | None = None) -> int:
        """Return how many weights are in the child, of one parameter or of all that are named."""
        names = self._words if name is None else (name,)
        return sum(int(ops.popcount_bits(self.words(n))) for n in names)

    def density(self, name: str | None = None) -> float:
        """Return the child's share of the weights of one parameter, or of all that are named (0.0 where none)."""
        total = sum(shape.numel() for shape in self._shapes.values()) if name is None else self.shape(name).numel()
        return self.count(name) / total if total else 0.0

    def save(self, path: str | os.PathLike) -> None:
        """Write the mask; a file at ``path`` is replaced at once or not at all."""
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "shapes": {name: tuple(shape) for name, shape in self._shapes.items()},
            "words": {name: words.cpu() for name, words in self._words.items()},
        }
        torch.save(content, partial)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> ChildMask:
        """Read a mask that `save` wrote, onto the CPU.

        Raises:
            ValueError: the file holds something else, or another format version.
        """
        content = torch.load(path, map_location="cpu", weights_only=True)
        found = (
            (content.get("format"), content.get("version"))
            if isinstance(content, dict)
            else (type(content).__name__, None)
        )
        if found != (_FORMAT, _VERSION):
            raise ValueError(
                f"{os.fspath(path)} must hold {_FORMAT} version {_VERSION}, got {found[0]} version {found[1]}"
            )
        return cls(content["words"], content["shapes"])

    def __contains__(self, name: str) -> bool:
        return name in self._words

    def __iter__(self) -> Iterator[str]:
        return iter(self._words)

    def __len__(self) -> int:
        return len(self._words)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ChildMask):
            return NotImplemented
        return self._shapes == other._shapes and all(
            torch.equal(self._words[n].cpu(), other._words[n].cpu()) for n in self
        )

    __hash__ = None

    def __repr__(self) -> str:
        return f"ChildMask({len(self)} parameters, {self.count():,} weights, density {self.density():.4f})"
