"""Lists that launchers may look through once, and what must be as it was before they may be used again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cached_property
from importlib import import_module
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    _compiled = import_module("..._C_python_" + re.sub(r"\W", "_", torch.__version__), __name__)
except ImportError:  # not built, or built for another torch
    _compiled = None
_FORM = attrgetter("dtype", "device", "layout", "shape")


def forms(tensors: list[Tensor]) -> Any:
    """Return something that is equal where dtypes, devices, layouts, signs, sizes and strides of all tensors are.

    Raises:
        TypeError: an entry is not a tensor.
    """
    if _compiled is not None:
        return _compiled.forms(tensors)
    try:
        strides = list(map(Tensor.stride, tensors))
    except RuntimeError:  # sparse tensors have none
        strides = [t.stride() if t.layout == torch.strided else None for t in tensors]
    return list(map(_FORM, tensors)), strides, list(map(Tensor.is_neg, tensors))


def addresses(tensors: list[Tensor]) -> np.ndarray:
    """Return the tensors' addresses, int64 [n]; 0 for a tensor without elements."""
    if _compiled is not None:
        return np.frombuffer(_compiled.addresses(tensors), np.int64)
    return np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))


class Fixed(list):
    """A list whose entries stay as they are while it exists, so that what a kernel needs of them is derived once.

    The holder vouches for it, and `renew` is how: between two steps a tensor may have been given other data, sizes,
    strides or another dtype, all with the same object (``tensor.data = ...``).
    """

    @classmethod
    def of(cls, values: Iterable) -> Fixed:
        """Return ``values`` themselves if they are fixed already, else a fixed copy."""
        return values if isinstance(values, cls) else cls(values)

    def renew(self, tensors: list[Tensor]) -> bool:
        """Take these tensors in place of the present ones if they have the same forms; return whether they do."""
        if forms(tensors) != self.forms:
            return False
        self.fill(tensors)
        return True

    def fill(self, tensors: list[Tensor]) -> None:
        """Take tensors of the same sizes and dtypes in place of the present ones; none, to let go of those."""
        self[:] = tensors
        self.__dict__.pop("addresses", None)

    def derive(self, name: str, partner: Fixed, make: Callable[[], Any]) -> Any:
        """Return ``make()``, made once as long as it is asked for with the same partner list."""
        kept = self.__dict__.get(name)
        if kept is None or kept[0] is not partner:
            kept = self.__dict__[name] = (partner, make())
        return kept[1]

    @cached_property
    def forms(self) -> Any:
        """The tensors' forms."""
        return forms(self)

    @cached_property
    def addresses(self) -> np.ndarray:
        """The tensors' addresses, int64 [n].

        Raises:
            RuntimeError: a tensor has elements and no memory, its storage having been given back.
        """
        found = addresses(self)
        if not found.all() and (lost := np.flatnonzero((found == 0) & (self.sizes != 0))).size:
            shape = tuple(self[lost[0]].shape)
            raise RuntimeError(f"tensor {lost[0]} of shape {shape} must have memory, got a storage that was given back")
        return found

    @cached_property
    def sizes(self) -> np.ndarray:
        """`numels` as int64 [n]."""
        return np.array(self.numels, np.int64)

    @cached_property
    def numels(self) -> tuple[int, ...]:
        """The tensors' element counts."""
        return tuple(map(Tensor.numel, self))

    @cached_property
    def dtypes(self) -> list[torch.dtype]:
        """The tensors' dtypes."""
        return [tensor.dtype for tensor in self]

    @cached_property
    def words(self) -> np.ndarray:
        """The list's integers, int64 [n]."""
        return np.array(self, np.int64)
