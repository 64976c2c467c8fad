"""The one parity gate: an implementation against the reference, bit for bit, before a number of it counts."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import ChildAdamW, ChildMask

STEPS = 3
SHAPES = {  # nothing, one element, an odd size, a block and its neighbours, several blocks
    "empty": (0,),
    "single": (1,),
    "odd": (33,),
    "below a block": (1023,),
    "block": (1024,),
    "above a block": (1025,),
    "large": (257, 129),
    "scalar": (),
    "matrix": (33, 65),
}
OUTSIDE = ("scalar", "matrix")  # that the masks do not name: trained fully
RULES: dict[str, dict[str, Any]] = {  # what is compared -> options; "mask" is the child's density
    "no mask": {},
    "F": dict(reserve_p=0.3),
    "D": dict(mask=0.1),
    "D, dense state": dict(mask=0.1, state="dense"),
    "F in D": dict(mask=0.1, reserve_p=0.3),
    "D, packed gradient": dict(mask=0.1, pack_gradients=True, max_grad_norm=math.inf),
}


def difference(impl: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> str | None:
    """Return how an implementation differs from the reference after a few steps of every rule, None if it does not.

    Args:
        impl: "triton", "csrc" or "reference".
        device: where both run.
        dtype: of weights and gradients.
    """
    for rule in RULES:
        try:
            expected, got = (_trained(rule, name, device, dtype) for name in ("reference", impl))
        except Exception as error:  # whatever a broken installation raises
            return f"{rule}: {type(error).__name__}: {error}"
        if different := [name for name in expected if not torch.equal(expected[name], got[name])]:
            return f"{rule}: {', '.join(different)} differ from the reference"
    return None


def _trained(rule: str, impl: str, device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return weights and state after a few steps on fixed gradients, by name."""
    generator = torch.Generator().manual_seed(0)

    def fixed(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    params = {name: torch.nn.Parameter(fixed(shape)) for name, shape in SHAPES.items()}
    options = dict(RULES[rule])
    if density := options.get("mask"):
        inside = {name: shape for name, shape in SHAPES.items() if name not in OUTSIDE}
        child = {name: torch.rand(shape, generator=generator) < density for name, shape in inside.items()}
        options["mask"] = ChildMask.from_dense({name: bits.to(device) for name, bits in child.items()})
    optimizer = ChildAdamW(params.items(), lr=0.01, seed=1, impl=impl, **options)
    for _ in range(STEPS):
        for param in params.values():
            param.backward(fixed(param.shape))  # so that hooks see it, where gradients are packed
        optimizer.step()
        optimizer.zero_grad()
    state = {f"{key} of {name}": value for name, p in params.items() for key, value in optimizer.state[p].items()}
    return {**{name: param.detach() for name, param in params.items()}, **state}
