"""What training a child network takes, in bytes: predicted from shapes, or counted on an optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import require
from .config import Config, require_gradients, resolve_state
from .gradients import TOGETHER
from .state import COMPANIONS, STATE, StateSpec

_INDEX = 4  # bytes


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
    packed_state, kept_as = resolve_state(state, low_precision, masked=p is not None, decay_outside=False)
    require_gradients(pack_gradients, fused_backward, packed=packed_state, clips=False)
    numels = {name: math.prod(shape) for name, shape in shapes.items()}
    if p is None or isinstance(p, Mapping):
        inside = {name: (p or {}).get(name, numel) for name, numel in numels.items()}
    else:
        require("p", p, 0 < p <= 1, "in (0, 1]")
        inside = {name: round(p * numel) for name, numel in numels.items()}
    everything, child = sum(numels.values()), sum(inside.values())
    kept = child if packed_state else everything
    partial = {name for name, k in inside.items() if k < numels[name]}
    packed = sum(inside[name] for name in partial if packed_state)
    gradients = everything
    if fused_backward:
        gradients = max(numels.values(), default=0)
    elif pack_gradients:
        gradients = child + max((numels[name] for name in partial), default=0)
        gradients = min(gradients + TOGETHER // weight_dtype.itemsize, child + sum(numels[name] for name in partial))
    nbytes = dict.fromkeys((*STATE, *COMPANIONS), 0)
    for field in StateSpec(None, state_dtype, kept_as).fields(weight_dtype):
        nbytes[field.key] = field.dtype.itemsize * (kept if field.per_weight else len(shapes))
    masked = 0 if p is None else sum(numels[n] for n in (p if isinstance(p, Mapping) else numels))
    return Memory(
        parameters=everything,
        weights=everything * weight_dtype.itemsize,
        gradients=gradients * weight_dtype.itemsize,
        moments=sum(nbytes[key] for key in STATE),
        companions=sum(nbytes[key] for key in COMPANIONS),
        indices=_INDEX * packed,
        mask=math.ceil(masked / 8),
    )


def measure(
    config: Config, params: list[Tensor], gradients: Iterable[Tensor | None], state: Mapping[Tensor, Mapping[str, Any]]
) -> Memory:
    """Count what an optimizer's tensors take now; before the first step there is no state yet."""
    entries = [state.get(param, {}) for param in params]
    mask, packing = config.mask, config.packing
    return Memory(
        parameters=sum(p.numel() for p in params),
        weights=_nbytes(params),
        gradients=_nbytes(grad for grad in gradients if grad is not None),
        moments=_nbytes(entry[key] for entry in entries for key in STATE if key in entry),
        companions=_nbytes(entry[key] for entry in entries for key in COMPANIONS if key in entry),
        indices=0 if packing is None else packing.nbytes(),
        mask=0 if mask is None else math.ceil(sum(mask.shape(name).numel() for name in mask) / 8),
    )


def _nbytes(tensors: Iterable[Any]) -> int:
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
