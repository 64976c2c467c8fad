"""What training a child network takes, in bytes: predicted from shapes, or counted on an optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..errors import require
from .gradients import TOGETHER
from .state import COMPANIONS, LOW_PRECISION, STATE

_STEP = 8  # bytes of a step counter
_INDEX = 4


@dataclass(frozen=True)
class Memory:
    """Bytes by kind; all but ``mask`` on the device.

    Attributes:
        parameters: how many weights there are.
        weights: the model's own parameters.
        gradients: while backward runs, at most.
        moments: exp_avg, exp_avg_sq and the step counters.
        companions: masters or compensations of 16-bit weights.
        indices: of the child, in packed state.
        mask: one bit a weight, where the mask is; in packed state on the CPU.
    """

    parameters: int
    weights: int
    gradients: int
    moments: int
    companions: int
    indices: int
    mask: int

    @property
    def state(self) -> int:
        """Bytes that the optimizer itself keeps on the device."""
        return self.moments + self.companions + self.indices

    @property
    def total(self) -> int:
        """Bytes on the device. Activations and the allocator's rounding come on top."""
        return self.weights + self.gradients + self.state

    def per_parameter(self) -> dict[str, float]:
        """Return bytes a weight, by kind, with ``state`` and ``total``."""
        kinds = {kind: nbytes for kind, nbytes in asdict(self).items() if kind != "parameters"}
        kinds |= {"state": self.state, "total": self.total}
        return {kind: nbytes / max(1, self.parameters) for kind, nbytes in kinds.items()}

    def __str__(self) -> str:
        lines = [f"{'':12} {'MB':>12} {'B a weight':>12}"]
        for kind, share in self.per_parameter().items():
            lines.append(f"{kind:12} {share * self.parameters / 1e6:12,.1f} {share:12.3f}")
        return "\n".join(lines)


def predict(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    p: float | Mapping[str, int] | None = None,
    state: str | None = None,
    weight_dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32,
    low_precision: str | None = None,
    pack_gradients: bool = False,
    fused_backward: bool = False,
) -> Memory:
    """Predict what `ChildAdamW` takes with these options.

    Args:
        shapes: name -> shape of every trained parameter.
        p: None: no mask. The child's share of every parameter, or name -> its weights in the child; parameters not
            named there are trained wholly.
        state, state_dtype, low_precision, pack_gradients, fused_backward: as for `ChildAdamW`; without a mask,
            low_precision None means "nearest".
        weight_dtype: of weights and gradients.

    Raises:
        ValueError: an option that `ChildAdamW` would refuse too.
    """
    state = state or ("dense" if p is None else "packed")
    low_precision = low_precision or ("master" if state == "packed" else "nearest")
    require("state", state, state == "dense" or (state == "packed" and p is not None), "'dense', or 'packed' with p")
    require("low_precision", low_precision, low_precision in LOW_PRECISION, f"one of {LOW_PRECISION}")
    require("pack_gradients", pack_gradients, not pack_gradients or state == "packed", "False without packed state")
    numels = {name: math.prod(shape) for name, shape in shapes.items()}
    if p is None or isinstance(p, Mapping):
        inside = {name: (p or {}).get(name, numel) for name, numel in numels.items()}
    else:
        require("p", p, 0 < p <= 1, "in (0, 1]")
        inside = {name: round(p * numel) for name, numel in numels.items()}
    everything, child = sum(numels.values()), sum(inside.values())
    kept = child if state == "packed" else everything
    partial = {name for name, k in inside.items() if k < numels[name]}
    packed = sum(inside[name] for name in partial if state == "packed")
    gradients = everything
    if fused_backward:
        gradients = max(numels.values(), default=0)
    elif pack_gradients:
        gradients = child + max((numels[name] for name in partial), default=0)
        gradients = min(gradients + TOGETHER // weight_dtype.itemsize, child + sum(numels[name] for name in partial))
    beside = {"master": 4, "kahan": weight_dtype.itemsize}.get(low_precision, 0) * (weight_dtype != torch.float32)
    masked = 0 if p is None else sum(numels[n] for n in (p if isinstance(p, Mapping) else numels))
    return Memory(
        parameters=everything,
        weights=everything * weight_dtype.itemsize,
        gradients=gradients * weight_dtype.itemsize,
        moments=2 * kept * state_dtype.itemsize + _STEP * len(shapes),
        companions=kept * beside,
        indices=_INDEX * packed,
        mask=math.ceil(masked / 8),
    )


def measure(optimizer) -> Memory:
    """Count what an optimizer's tensors take now; before the first step there is no state yet."""
    params = [param for param, _, _ in optimizer.named()]
    holders = [optimizer.gradient_holder(p) for p in params]
    gradients = [t for t in {id(h): h.grad for h in (*params, *holders)}.values() if t is not None]
    if optimizer.pack_gradients:
        gradients += [grad for _, grad in optimizer.hooks.waiting]
    entries = [optimizer.state.get(p, {}) for p in params]
    mask = optimizer.mask
    return Memory(
        parameters=sum(p.numel() for p in params),
        weights=_nbytes(params),
        gradients=_nbytes(gradients),
        moments=_nbytes(entry[key] for entry in entries for key in STATE if key in entry),
        companions=_nbytes(entry[key] for entry in entries for key in COMPANIONS if key in entry),
        indices=0 if optimizer.packing is None else optimizer.packing.nbytes(),
        mask=0 if mask is None else math.ceil(sum(mask.shape(name).numel() for name in mask) / 8),
    )


def _nbytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
