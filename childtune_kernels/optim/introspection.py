"""describe(), mask_at() and the search for weights that changed outside the child."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import ops, philox
from ..errors import require
from ..mask import ChildMask
from ..names import canonical, listed, matching
from .config import Config
from .groups import Member


def describe(config: Config, groups: list[dict[str, Any]], members: list[Member], impl: str) -> str:
    """Return a table: per group, how many weights are trained and which share of the gradient reaches them."""
    mask = config.mask
    lines = [f"{'group':>5} {'tensors':>8} {'weights':>14} {'in child':>14} {'share':>7}  rule"]
    for index, group in enumerate(groups):
        whole = [(p, name) for p, name, g in members if g is group]
        own = [(p, name) for p, name in whole if p.requires_grad]
        weights = sum(p.numel() for p, _ in own)
        masked = [name for _, name in own if mask is not None and name in mask]
        child = weights + sum(mask.count(name) - mask.shape(name).numel() for name in masked)
        rules = [f"D: {len(masked)} tensors masked, decay={config.decay!r}"] if masked else []
        if group["reserve_p"] < 1:
            rules.append(f"F: a fresh {group['reserve_p']:g} of the gradient each step, seed {group['seed']}")
        if frozen := [p.numel() for p, _ in whole if not p.requires_grad]:
            rules.append(f"frozen: {len(frozen)} tensors of {sum(frozen):,} weights")
        share = child / weights if weights else 0.0
        rule = "; ".join(rules if masked or group["reserve_p"] < 1 else ["every weight", *rules])
        lines.append(f"{index:>5} {len(own):>8} {weights:>14,} {child:>14,} {share:>7.2%}  {rule}")
    state = f"state {'dense' if config.packing is None else 'packed'}, moments {config.state_dtype}"
    low = f"16-bit weights: {config.rounding(groups)}"
    return "\n".join([*lines, f"{config.dialect} dialect, {state}, {low}, implementation: {impl}"])


def mask_at(mask: ChildMask | None, members: list[Member], step: int, name: str) -> Tensor:
    """Regenerate the gradient mask of one parameter at one step; see `ChildAdamW.mask_at`."""
    require("step", step, isinstance(step, int) and step >= 1, "an integer of at least 1")
    rows = {own_name: (param, group) for param, own_name, group in members}
    if (own_name := matching(name, rows)) is None:
        raise KeyError(f"name must be one of the optimizer's parameter names ({listed(list(rows))}), got {name!r}")
    name, (param, group) = own_name, rows[own_name]
    keep = torch.ones(param.shape, dtype=torch.bool, device=param.device)
    if mask is not None and name in mask:
        keep = mask.to_dense(name).to(param.device)
    if group["reserve_p"] < 1:
        key = philox.stream_key(group["seed"], name)
        sample = (param.numel(), key, step, group["reserve_p"], philox.GRADIENT_MASK, 0)
        words = ops.bernoulli_bits(*sample, device=param.device)
        keep &= ops.unpack_bits(words, param.numel()).view(param.shape)
    return keep


def changed_outside_child(mask: ChildMask, members: list[Member], reference: Mapping[str, Tensor]) -> dict[str, int]:
    """Return, by name, how many weights outside the child differ in any bit from a reference, where any do.

    Raises:
        ValueError: the reference lacks a parameter that the mask names, or has it of another shape or dtype.
    """
    differing = {}
    params = {name: param for param, name, _ in members}
    references = dict(zip(canonical(reference), reference.values(), strict=True))
    for name in mask:
        param, other = params[name], references.get(name)
        expected = f"{tuple(param.shape)} {param.dtype}"
        got = "nothing" if other is None else f"{tuple(other.shape)} {other.dtype}"
        require(f"reference of {name!r}", got, got == expected, expected)
        integers = {2: torch.int16, 4: torch.int32}[param.element_size()]
        bits = [tensor.detach().to(param.device).resolve_neg().contiguous().view(integers) for tensor in (param, other)]
        outside = ~mask.to_dense(name).to(param.device)
        if count := int(((bits[0] != bits[1]) & outside).sum()):
            differing[name] = count
    return differing
