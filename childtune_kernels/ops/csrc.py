"""Loads the compiled libraries, `_C_cpu` and `_C_cuda`, that ../../csrc builds, where there are any."""

from __future__ import annotations

from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parent.parent
_loaded: dict[str, str | None] = {}  # device type -> why it is not served, None where it is


def load() -> None:
    """Load what was built for this torch. The op schemas must be defined before."""
    for device_type in ("cpu", "cuda"):
        _loaded[device_type] = _load(device_type)


def unavailable(device_type: str) -> str | None:
    """Return why compiled kernels cannot serve a device type, or None where they can."""
    return _loaded.get(device_type, "csrc serves CPU and CUDA tensors")


def _load(device_type: str) -> str | None:
    if device_type == "cuda" and torch.version.cuda is None:
        return "this torch is built without CUDA"
    paths = sorted(_PACKAGE.glob(f"_C_{device_type}*.so"))
    if not paths:
        return (
            f"the {device_type} part of csrc is not built; `pip install --no-build-isolation .` builds it where "
            f"{'nvcc' if device_type == 'cuda' else 'a C++ compiler'} is installed"
        )
    try:
        torch.ops.load_library(paths[0])
    except OSError as error:  # built against another CUDA or an older torch
        return f"{paths[0].name} cannot be loaded ({error})"
    return None
