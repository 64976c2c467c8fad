"""What is kept for a parameter: step, exp_avg, exp_avg_sq and, for 16-bit weights, a master or a compensation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import ADAMW, Rule, checks
from .groups import Member
from .packing import Packing, unpack

MOMENTS = ("exp_avg", "exp_avg_sq")  # of any rule
STATE = ("step", *MOMENTS)
LOW_PRECISION = ("master", "kahan", "stochastic", "nearest")
COMPANIONS = ("master", "compensation")  # keys of the state
_COMPANION_OF = {"master": "master", "kahan": "compensation"}  # by how 16-bit weights are kept
_SIXTEEN_BIT = {torch.bfloat16, torch.float16}


class StateField(NamedTuple):
    """One tensor of a parameter's state."""

    key: str
    dtype: torch.dtype
    per_weight: bool  # shaped like the parameter or, packed, like its child; otherwise one number


class StateSpec:
    """The table of what one optimizer keeps for each parameter.

    Args:
        packing: of the child, where moments and companions are packed.
        moment_dtype: of all moments.
        low_precision: how 16-bit weights are kept, one of LOW_PRECISION.
        rule: whose moments these are.

    Attributes:
        moments: their keys.
        keys: of what every parameter has.
    """

    def __init__(self, packing: Packing | None, moment_dtype: torch.dtype, low_precision: str, rule: Rule = ADAMW):
        self.moments, self.keys = rule.moments, ("step", *rule.moments)
        self.packing = packing
        self.moment_dtype = moment_dtype
        self.low_precision = low_precision

    def fields(self, param_dtype: torch.dtype) -> list[StateField]:
        """Return what is kept for a parameter of a dtype; step counters count to 2**32, which float32 cannot."""
        fields = [StateField("step", torch.float64, False)]
        fields += [StateField(key, self.moment_dtype, True) for key in self.moments]
        if key := self.companion_key(param_dtype):
            fields.append(StateField(key, torch.float32 if key == "master" else param_dtype, True))
        return fields

    def companion_key(self, param_dtype: torch.dtype) -> str | None:
        """Return which companion a parameter of a dtype has."""
        return _COMPANION_OF.get(self.low_precision) if param_dtype in _SIXTEEN_BIT else None

    def shape(self, name: str, param: Tensor) -> torch.Size:
        """Return the shape of a parameter's moments and companion: its own, or [weights in the child] if packed."""
        return param.shape if self.packing is None else self.packing.shape(name, param)

    def new(self, name: str, param: Tensor) -> dict[str, Tensor]:
        """Return the entry of a parameter that has taken no step yet."""
        return {field.key: self._start(field, name, param) for field in self.fields(param.dtype)}

    def check(self, name: str, param: Tensor, entry: Mapping[str, Any]) -> None:
        """Refuse an entry whose tensors are not what the table says.

        Raises:
            RuntimeError: naming the tensor, what was expected and what came.
        """
        shape = self.shape(name, param)
        self._check_moments(name, param, entry)
        if key := self.companion_key(param.dtype):
            checks.check_companion(f"companion of {name!r}", entry[key], param, shape)

    def _check_moments(self, name: str, param: Tensor, entry: Mapping[str, Any]) -> None:
        moments = {key: entry[key] for key in self.moments}
        checks.check_state(f"state of {name!r}", param, entry["step"], moments, self.shape(name, param))

    def missing(
        self, members: Iterable[Member], state: Mapping[Tensor, dict[str, Any]]
    ) -> dict[Tensor, dict[str, Any]]:
        """Return the entries that parameters lack, or have only in part, made whole; nothing is written.

        Raises:
            RuntimeError: an entry is of another parameter's form, or a CUDA graph is being captured.
        """
        fresh = {}
        for param, name, _ in members:
            entry = state.get(param)
            if not entry:
                fresh[param] = self.new(name, param)
                continue
            whole = self.completed(name, param, entry)
            if whole.keys() != entry.keys() or any(whole[key] is not entry[key] for key in whole):
                # before it is kept: a master made of a parameter of another shape would outlive the refusal
                self._check_moments(name, param, whole)
                fresh[param] = whole
        if any(p.is_cuda for p in fresh) and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("optimizer state must exist before a CUDA graph is captured: run one step first")
        return fresh

    def completed(self, name: str, param: Tensor, entry: dict[str, Any]) -> dict[str, Any]:
        """Return an entry as steps need it, after weights were cast or a counter was put in as torch has it.

        Raises:
            RuntimeError: a moment or the counter is missing, or the counter is not a single number.
        """
        if missing := [key for key in self.keys if key not in entry]:
            raise RuntimeError(f"state of {name!r} must hold {', '.join(self.keys)}, got no {', '.join(missing)}")
        return self.with_companion(name, param, {**entry, "step": counter(name, param, entry["step"])})

    def with_companion(self, name: str, param: Tensor, entry: dict[str, Any]) -> dict[str, Any]:
        """Return an entry with the companion that the parameter has, and with no other.

        A compensation of another dtype is of weights that have been cast since: it starts anew.
        """
        wanted = {field.key: field for field in self.fields(param.dtype) if field.key in COMPANIONS}
        entry = {key: value for key, value in entry.items() if key not in COMPANIONS or key in wanted}
        for key, field in wanted.items():
            is_cast = key == "compensation" and key in entry and {entry[key].dtype, param.dtype} == _SIXTEEN_BIT
            if key not in entry or is_cast:
                entry[key] = self._start(field, name, param)
        return entry

    def converted(self, name: str, param: Tensor, entry: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of an entry whose tensors are shaped like their parameter, as this table has them."""
        result = {**entry, "step": counter(name, param, entry["step"]).clone()}
        for field in self.fields(param.dtype):
            if field.per_weight and field.key in entry:
                value = self._pack(name, entry[field.key].to(param.device, field.dtype))
                result[field.key] = value.clone(memory_format=torch.contiguous_format)
        return self.with_companion(name, param, result)

    def _start(self, field: StateField, name: str, param: Tensor) -> Tensor:
        if field.key == "master":
            return self._pack(name, param.detach()).to(field.dtype, memory_format=torch.contiguous_format)
        shape = self.shape(name, param) if field.per_weight else ()
        return torch.zeros(shape, dtype=field.dtype, device=param.device)

    def _pack(self, name: str, values: Tensor) -> Tensor:
        return values if self.packing is None else self.packing.pack(name, values)


def counter(name: str, param: Tensor, step: Tensor | float) -> Tensor:
    """Return a step count as float64 [] on the parameter's device; itself where it is one."""
    step = torch.as_tensor(step)
    if step.numel() != 1:
        raise RuntimeError(f"state of {name!r}: step must be one number, got shape {tuple(step.shape)}")
    if step.dtype == torch.float64 and not step.dim() and step.device == param.device:
        return step
    return step.detach().to(param.device, torch.float64).view(())


def unpacked(entry: dict[str, Any], words: Tensor | None, param: Tensor) -> dict[str, Any]:
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
