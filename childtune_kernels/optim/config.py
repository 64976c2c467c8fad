"""What an optimizer was asked for and does not change between steps: checked once, pickled, predicted from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import ops
from ..errors import require
from ..mask import ChildMask
from ..ops import checks
from .packing import Packing
from .state import LOW_PRECISION, StateSpec


@dataclass(frozen=True, eq=False)
class Config:
    """`ChildAdamW`'s options that belong to no parameter group, under the constructor's names.

    Attributes:
        rule: the formula of a step.
        packing: where each parameter's child lies, in packed state; None in dense state.
        spec: what is kept for each parameter.

    Raises:
        ValueError, TypeError: an option out of range or beside one that it does not go with.
    """

    mask: ChildMask | None = None
    dialect: str = "torch"
    decay: str = "child"
    state: str | None = None
    state_dtype: torch.dtype = torch.float32
    low_precision: str | None = None
    max_grad_norm: float | None = None
    pack_gradients: bool = False
    fused_backward: bool = False
    impl: str = "auto"
    rule: ops.Rule = ops.ADAMW
    packing: Packing | None = field(init=False, repr=False)
    spec: StateSpec = field(init=False, repr=False)

    def __post_init__(self):
        norm, impls = self.max_grad_norm, ("auto", *ops.IMPLEMENTATIONS)
        require("dialect", self.dialect, self.dialect in ("torch", "hf"), "'torch' or 'hf'")
        require("decay", self.decay, self.decay in ("child", "all"), "'child' or 'all'")
        dtypes = "float32, bfloat16 or float16"
        require("state_dtype", self.state_dtype, self.state_dtype in checks.WEIGHT_DTYPES, dtypes)
        require("mask", self.mask, self.mask is None or isinstance(self.mask, ChildMask), "a ChildMask or None")
        require("max_grad_norm", norm, norm is None or norm > 0, "above 0 or None")
        require("impl", self.impl, self.impl in impls, f"one of {impls}")
        masked, decays = self.mask is not None, self.decay == "all"
        packed, kept = resolve_state(self.state, self.low_precision, masked=masked, decay_outside=decays)
        require_gradients(self.pack_gradients, self.fused_backward, packed=packed, clips=self.clips)
        packing = Packing(self.mask) if packed else None
        derived = {"packing": packing, "spec": StateSpec(packing, self.state_dtype, kept, self.rule)}
        if packing is not None:
            derived["mask"] = packing.mask
        self.__dict__.update(derived)  # frozen: what was asked for does not change

    @property
    def clips(self) -> bool:
        """Whether a step clips by the global norm."""
        return self.max_grad_norm is not None and self.max_grad_norm < math.inf

    def rounding(self, groups: Sequence[dict[str, Any]]) -> str:
        """Return how 16-bit weights are kept: "master", "kahan", "stochastic" or "nearest"."""
        random = self.mask is None and any([group["reserve_p"] < 1 for group in groups])
        return "stochastic" if random and self.low_precision is None else self.spec.low_precision

    def needs_names(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Whether masks or rounding depend on what the parameters are called."""
        sampled = any([group["reserve_p"] < 1 for group in groups])
        return self.mask is not None or sampled or self.rounding(groups) == "stochastic"


def resolve_state(
    state: str | None, low_precision: str | None, *, masked: bool, decay_outside: bool
) -> tuple[bool, str]:
    """Return whether state is packed and how 16-bit weights are kept where F does not sample.

    Raises:
        ValueError: naming the option.
    """
    fits = masked and not decay_outside
    state = state or ("packed" if fits else "dense")
    decay = "all" if decay_outside else "child"
    outside = f"'dense' where decay={decay!r} or there is no mask: packed state is the child's alone"
    require("state", state, state in ("packed", "dense"), "'packed' or 'dense'")
    require("state", state, state == "dense" or fits, outside)
    packed = state == "packed"
    kept = low_precision or ("master" if packed else "nearest")
    require("low_precision", kept, kept in LOW_PRECISION, f"one of {LOW_PRECISION}")
    require("low_precision", kept, kept == "nearest" or packed or not masked, "'nearest' where state='dense'")
    return packed, kept


def require_gradients(pack_gradients: bool, fused_backward: bool, *, packed: bool, clips: bool) -> None:
    """Refuse ways to treat gradients that do not go with the rest.

    Raises:
        ValueError: naming the option.
    """
    fits = packed or not pack_gradients
    require("pack_gradients", pack_gradients, fits, "False where the state is not packed")
    alone = not fused_backward or not (pack_gradients or clips)
    require("fused_backward", fused_backward, alone, "False where pack_gradients or max_grad_norm is given")
