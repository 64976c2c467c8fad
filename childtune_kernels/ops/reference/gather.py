"""The child's entries of gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gather_child_(packed: Sequence[Tensor], grads: Sequence[Tensor], indices: Sequence[Tensor], add: bool) -> None:
    """packed = grad[indices], or packed + that: the child's entries of gradients."""
    for target, grad, index in zip(packed, grads, indices, strict=True):
        entries = torch.index_select(grad.reshape(-1), 0, index)
        target.copy_(target + entries if add else entries)
