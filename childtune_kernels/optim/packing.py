"""How an optimizer holds what belongs to the child: packed, in the order of the mask's bits, or like its parameter."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .. import ops
from ..errors import require
from ..mask import ChildMask


class Packing:
    """Where each parameter's child lies, for tensors that hold nothing else.

    A parameter that is partly in the child has int32 indices, ascending, and packed tensors of as many entries. One
    that is wholly in the child, or not named by the mask, has no indices and tensors of its own shape; one wholly
    outside has neither indices nor entries. Indices are made when first asked for and kept.

    Args:
        mask: the child network; kept on the CPU, since the indices are all that a step reads.
    """

    def __init__(self, mask: ChildMask):
        self.mask = mask.to("cpu")
        self._indices: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        for name in self.mask:
            numel = self.mask.shape(name).numel()
            require(f"mask of {name!r}", f"{numel} elements", numel < 2**31, "below 2**31 elements in packed state")

    def count(self, name: str) -> int:
        """Return how many weights of one parameter that the mask names are in the child."""
        if name not in self._counts:
            self._counts[name] = self.mask.count(name)
        return self._counts[name]

    def is_partial(self, name: str) -> bool:
        """Whether some weights of a parameter are in the child and some are not."""
        return name in self.mask and 0 < self.count(name) < self.mask.shape(name).numel()

    def is_whole(self, name: str) -> bool:
        """Whether a parameter is trained wholly: its tensors are like itself."""
        return name not in self.mask or self.count(name) == self.mask.shape(name).numel()

    def shape(self, name: str, param: Tensor) -> torch.Size:
        """Return the shape of what is held for a parameter's child."""
        return param.shape if self.is_whole(name) else torch.Size((self.count(name),))

    def indices(self, name: str, device: torch.device) -> Tensor:
        """Return the child's elements of one parameter, int32 [count], or [0] where none or all are in it."""
        kept = self._indices.get(name)
        if kept is None or kept.device != device:
            kept = torch.empty(0, dtype=torch.int32, device=device)
            if self.is_partial(name):
                kept = _positions(self.mask.words(name).to(device), self.mask.shape(name).numel())
            self._indices[name] = kept
        return kept

    def pack(self, name: str, values: Tensor) -> Tensor:
        """Return the child's entries of a parameter-shaped tensor."""
        if self.is_whole(name):
            return values
        # all of it outside: no indices, no entries
        return torch.index_select(values.reshape(-1), 0, self.indices(name, values.device))

    def nbytes(self) -> int:
        """Return the bytes that the indices made so far take."""
        return sum(index.nbytes for index in self._indices.values())


def unpack(packed: Tensor, words: Tensor, outside: Tensor) -> Tensor:
    """Return packed entries where the words' bits are set, and ``outside``, in their dtype, elsewhere."""
    result = outside.to(packed.dtype, copy=True, memory_format=torch.contiguous_format)
    result.view(-1)[_positions(words.to(result.device), result.numel())] = packed.to(result.device)
    return result


def _positions(words: Tensor, numel: int) -> Tensor:
    return ops.unpack_bits(words, numel).nonzero().view(-1).to(torch.int32)


def fitting_mask(mask: ChildMask, params: Mapping[str, Tensor]) -> ChildMask:
    """Return a mask by the names of these parameters.

    Raises:
        ValueError: it names others, has one of another shape, or has no weight in the child at all.
    """
    try:
        mask = mask.fitted(params)
    except ValueError as error:
        raise ValueError(
            "mask must be a mask that names only this optimizer's parameters, which it knows from "
            f"model.named_parameters() or groups of (name, parameter): {error}"
        ) from error
    for name in mask:
        check_shape(mask, name, params[name])
    empty = any(mask.shape(name).numel() for name in mask) and mask.count() == 0
    require(
        "mask", "an empty child", not empty, "one with at least one weight: this one would freeze all that it names"
    )
    return mask


def check_shape(mask: ChildMask, name: str, param: Tensor) -> None:
    """Refuse a mask that has a parameter of another shape."""
    got, expected = tuple(mask.shape(name)), tuple(param.shape)
    require(f"mask of {name!r}", got, got == expected, f"of shape {expected}")
