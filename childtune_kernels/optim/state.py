"""What an optimizer keeps for a parameter: torch's keys and, beside a 16-bit weight, what that lacks of an fp32 one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .packing import Packing, unpack

MOMENTS = ("exp_avg", "exp_avg_sq")
STATE = ("step", *MOMENTS)
LOW_PRECISION = ("master", "kahan", "stochastic", "nearest")
COMPANIONS = ("master", "compensation")  # keys of the state
SIXTEEN_BIT = {torch.bfloat16, torch.float16}


class StateLayout:
    """The form of every entry of one optimizer's state.

    Args:
        packing: of the child, where moments and companions are packed.
        moment_dtype: of both moments.
        low_precision: how 16-bit weights are kept, one of LOW_PRECISION.
    """

    def __init__(self, packing: Packing | None, moment_dtype: torch.dtype, low_precision: str):
        self.packing = packing
        self.moment_dtype = moment_dtype
        self.low_precision = low_precision

    def shape(self, name: str, param: Tensor) -> torch.Size:
        """Return the shape of a parameter's moments and companion: its own, or [weights in the child] if packed."""
        return param.shape if self.packing is None else self.packing.shape(name, param)

    def companion_key(self, param: Tensor) -> str | None:
        """Return which companion a parameter has."""
        if param.dtype == torch.float32:
            return None
        return {"master": "master", "kahan": "compensation"}.get(self.low_precision)

    def new(self, name: str, param: Tensor) -> dict[str, Tensor]:
        """Return the entry of a parameter that has taken no step yet."""
        shape = self.shape(name, param)
        entry = {"step": torch.zeros((), dtype=torch.float64, device=param.device)}  # counts to 2**32, fp32 to 2**24
        entry |= {key: torch.zeros(shape, dtype=self.moment_dtype, device=param.device) for key in MOMENTS}
        return self.accompanied(name, param, entry)

    def accompanied(self, name: str, param: Tensor, entry: dict[str, Any]) -> dict[str, Any]:
        """Return an entry with the companion that the parameter has, and with no other.

        A compensation of another dtype is of weights that have been cast since: it starts anew.
        """
        key = self.companion_key(param)
        entry = {k: v for k, v in entry.items() if k not in COMPANIONS or k == key}
        if key == "compensation" and key in entry and {entry[key].dtype, param.dtype} == SIXTEEN_BIT:
            del entry[key]
        if key == "compensation" and key not in entry:
            entry[key] = torch.zeros(self.shape(name, param), dtype=param.dtype, device=param.device)
        elif key == "master" and key not in entry:
            packed = param.detach() if self.packing is None else self.packing.pack(name, param.detach())
            entry[key] = packed.to(torch.float32, memory_format=torch.contiguous_format)
        return entry

    def completed(self, name: str, param: Tensor, entry: dict[str, Any]) -> dict[str, Any]:
        """Return an entry as steps need it, after weights were cast or a counter was put in as torch has it.

        Raises:
            RuntimeError: a moment or the counter is missing, or the counter is not a single number.
        """
        if missing := [key for key in STATE if key not in entry]:
            raise RuntimeError(f"state of {name!r} must hold {', '.join(STATE)}, got no {', '.join(missing)}")
        return self.accompanied(name, param, {**entry, "step": counter(name, param, entry["step"])})

    def arranged(self, name: str, param: Tensor, entry: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of an entry whose tensors are like their parameter, in this layout."""
        dtypes = {**dict.fromkeys(MOMENTS, self.moment_dtype), "master": torch.float32, "compensation": param.dtype}
        arranged = dict(entry)
        for key in dtypes.keys() & entry.keys():
            value = entry[key].to(param.device, dtypes[key])
            packed = value if self.packing is None else self.packing.pack(name, value)
            arranged[key] = packed.clone(memory_format=torch.contiguous_format)
        arranged["step"] = counter(name, param, entry["step"]).clone()
        return self.accompanied(name, param, arranged)


def counter(name: str, param: Tensor, step: Tensor | float) -> Tensor:
    """Return a step count as float64 [] on the parameter's device; itself where it is one."""
    step = torch.as_tensor(step)
    if step.numel() != 1:
        raise RuntimeError(f"state of {name!r}: step must be one number, got shape {tuple(step.shape)}")
    return (
        step
        if step.dtype == torch.float64 and not step.dim() and step.device == param.device
        else (step.detach().to(param.device, torch.float64).view(()))
    )


def dense(entry: dict[str, Any], words: Tensor | None, param: Tensor) -> dict[str, Any]:
    """Return an entry whose tensors are like their parameter: outside the child, moments are 0 and masters weights.

    Args:
        words: the mask's, of a parameter that is held packed; None: of one that the mask does not name.
    """
    result = dict(entry)
    for key in (*MOMENTS, *COMPANIONS):
        if key in entry and entry[key].shape != param.shape and words is not None:
            outside = param.detach().float() if key == "master" else torch.zeros(param.shape, device=param.device)
            result[key] = unpack(entry[key], words, outside)
    return result
