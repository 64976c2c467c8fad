"""Lists that launchers may look through once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor


def addresses(tensors: list[Tensor]) -> np.ndarray:
    """Return the tensors' addresses, int64 [n]; 0 for a tensor without elements."""
    return np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))


class Fixed(list):
    """A list whose entries stay as they are while it exists, so that what a kernel needs of them is derived once.

    The holder vouches for it: a look at one attribute of 393 tensors costs 25 us of host time.
    """

    @classmethod
    def of(cls, values: Iterable) -> Fixed:
        """Return ``values`` themselves if they are fixed already, else a fixed copy."""
        return values if isinstance(values, cls) else cls(values)

    def derive(self, name: str, partner: Fixed, make: Callable[[], Any]) -> Any:
        """Return ``make()``, made once as long as it is asked for with the same partner list."""
        kept = self.__dict__.get(name)
        if kept is None or kept[0] is not partner:
            kept = self.__dict__[name] = (partner, make())
        return kept[1]

    @cached_property
    def addresses(self) -> np.ndarray:
        """The tensors' addresses, int64 [n]."""
        return addresses(self)

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
