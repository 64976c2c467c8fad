"""How exact the arithmetic in force is: what two ways to compute the same number may differ by."""

from __future__ import annotations

from collections.abc import Iterable

import torch

_EPS = {"tf32": 2.0**-10, "bf16": 2.0**-7}  # torch's names of what float32 products may be computed in


def rounding(dtypes: Iterable[torch.dtype], device: torch.device) -> float:
    """Return the largest relative rounding error of one operation on a device, among tensors of some dtypes."""
    floating = {dtype for dtype in dtypes if dtype.is_floating_point}
    errors = [torch.finfo(dtype).eps for dtype in floating]
    if torch.float32 in floating:
        errors.append(_EPS.get(_float32_products(device.type), 0.0))
        errors.append(_EPS.get(_float32_convolutions(device.type), 0.0))
    return max(errors)


def _float32_products(kind: str) -> str:
    if kind == "cuda":
        return torch.backends.cuda.matmul.fp32_precision
    return torch.backends.mkldnn.matmul.fp32_precision if kind == "cpu" else "ieee"


def _float32_convolutions(kind: str) -> str:
    if kind == "cuda":
        return torch.backends.cudnn.conv.fp32_precision
    return torch.backends.mkldnn.conv.fp32_precision if kind == "cpu" else "ieee"
