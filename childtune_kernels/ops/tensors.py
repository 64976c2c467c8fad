"""Lists of tensors whose addresses, sizes and dtypes are computed once, and what must not change meanwhile."""

from __future__ import annotations

import re
from collections.abc import Iterable
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


class TensorList(list):
    """A list of tensors whose addresses, sizes and dtypes are computed once.

    The caller must not change the tensors' forms meanwhile, and `renew` says whether they are what they were: between
    two steps a tensor may have been given other data, sizes, strides or another dtype, all with the same object
    (``tensor.data = ...``).
    """

    @classmethod
    def of(cls, values: Iterable[Tensor]) -> TensorList:
        """Return ``values`` themselves if they are such a list already, else a copy that is."""
        return values if isinstance(values, cls) else cls(values)

    @classmethod
    def formed(cls, tensors: Iterable[Tensor]) -> TensorList:
        """Return a list that knows the forms which its tensors have now."""
        result = cls(tensors)
        _ = result.forms
        return result

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


class IntList(list):
    """A list of signed 64-bit integers, stream keys for example, whose array is made once."""

    @classmethod
    def of(cls, values: Iterable[int]) -> IntList:
        """Return ``values`` themselves if they are such a list already, else a copy that is."""
        return values if isinstance(values, cls) else cls(values)

    @cached_property
    def array(self) -> np.ndarray:
        """The integers as int64 [n]."""
        return np.array(self, np.int64)
