"""Optimizer state between runs: what a state dict holds, and state of other optimizers and layouts on its way in.

Beside torch's keys, the entry of a parameter that a mask names holds ``child``, its mask words, int32 on the CPU; one
that has taken no step yet has an entry for this alone. So packed state can be read by any optimizer, which takes on the
child if it has none, and is refused by one of another mask.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops, philox
from ..errors import require
from ..mask import ChildMask
from ..names import canonical, listed
from .config import Config
from .groups import Member, check_group, group_sizes, require_sampling
from .state import COMPANIONS, STATE, unpacked

CHILD = "child"


Groups = list[dict[str, Any]]
State = dict[Tensor, dict[str, Any]]


def tag_child(state_dict: dict[str, Any], config: Config, members: list[Member]) -> dict[str, Any]:
    """Return a state dict whose entries say which child they belong to: copies, because loaders may write into them."""
    if config.mask is None:
        return state_dict
    state = dict(state_dict["state"])
    for index, (param, name, _) in enumerate(members):
        if name in config.mask:
            entry = state.get(index) or config.spec.new(name, param)
            state[index] = {**entry, CHILD: config.mask.words(name).cpu().clone()}
    return {**state_dict, "state": state}


def adopted_mask(config: Config, groups: Groups, members: list[Member], loaded: dict[str, Any]) -> ChildMask | None:
    """Return the child that a state dict belongs to, for an optimizer that has none; None if there is none.

    Raises:
        ValueError: the optimizer's options have no room for it.
    """
    indices = [index for group in loaded["param_groups"] for index in group["params"]]
    entries = [loaded["state"].get(index) or {} for index in indices]
    if config.mask is not None or not any(CHILD in entry for entry in entries):
        return None
    room = config.decay == "child" and config.state != "dense"
    expected = "a dense_state_dict() where the optimizer has no mask, and decay='all' or state='dense'"
    require("state_dict", "a child network's", room, expected)
    require_groups(groups, loaded)
    rows = zip(members, entries, strict=True)
    words = {name: (entry[CHILD], param.shape) for (param, name, _), entry in rows if CHILD in entry}
    warnings.warn(
        "the state belongs to a child network and this optimizer was given no mask: it takes on that child. To train "
        "all weights, load dense_state_dict() instead",
        stacklevel=5,
    )
    return ChildMask({n: w for n, (w, _) in words.items()}, {n: shape for n, (_, shape) in words.items()})


_DECIDED = ("reserve_p", "seed", "weight_decay")  # what a script says once, and a scheduler seldom


def merged_groups(groups: Groups, loaded: dict[str, Any]) -> Groups:
    """Return the groups of a checked state dict, completed by the optimizer's own; say what they change."""
    names_in, merged, changes = canonical_names(loaded), [], set()
    for own, saved in zip(groups, loaded["param_groups"], strict=True):
        group = {**{key: value for key, value in own.items() if key != "params"}, **saved}
        if names := own.get("param_names") or names_in(saved):
            group["param_names"] = names
        changes |= {f"{key} {group[key]!r} (here {own[key]!r})" for key in _DECIDED if group[key] != own[key]}
        merged.append(group)
    if changes:
        said = ", ".join(sorted(changes))
        warnings.warn(f"hyper-parameters come from the state, as in torch: {said}", stacklevel=5)
    return merged


def require_groups(groups: Groups, loaded: dict[str, Any]) -> None:
    """Refuse a state dict of other groups."""
    sizes, expected = group_sizes(loaded["param_groups"]), group_sizes(groups)
    require("state_dict", f"groups of {sizes}", sizes == expected, f"parameter groups of {expected} parameters")


def without_child(state_dict: dict[str, Any], members: list[Member]) -> dict[str, Any]:
    """Return a state dict as torch.optim.AdamW has it: parameter-shaped moments, zero outside the child; fp32 steps."""
    state = {}
    for index, entry in state_dict["state"].items():
        if not entry:  # cleared: it starts anew
            continue
        full = unpacked(entry, entry.get(CHILD), members[index].param)
        state[index] = {key: value for key, value in full.items() if key not in (CHILD, *COMPANIONS)}
        state[index]["step"] = torch.as_tensor(entry["step"]).float()
    return {**state_dict, "state": state}


def moved_state(members: list[Member], state: State, config: Config, new: Config) -> State:
    """Return the state that an optimizer has, by parameter, as another configuration keeps it."""
    packing, moved = config.packing, {}
    for param, name, _ in members:
        if entry := state.get(param):
            words = packing.mask.words(name) if packing is not None and name in packing.mask else None
            moved[param] = new.spec.converted(name, param, unpacked(entry, words, param))
    return moved


def read_state(config: Config, groups: Groups, members: list[Member], loaded: dict[str, Any]) -> State:
    """Check a state dict and return its entries, copied, by parameter, as a configuration keeps them.

    Raises:
        ValueError: as `ChildAdamW.load_state_dict`.
    """
    require_groups(groups, loaded)
    names_of = {member.param: member.name for member in members}
    names_in = canonical_names(loaded)
    state = {}
    for own, saved in zip(groups, loaded["param_groups"], strict=True):
        version = saved.get("mask_stream", philox.STREAM_VERSION)
        wanted = f"mask stream version {philox.STREAM_VERSION}"
        require("state_dict", f"version {version}", version == philox.STREAM_VERSION, wanted)
        require("state_dict", "amsgrad state", not saved.get("amsgrad"), "state without amsgrad")
        names, saved_names = own.get("param_names"), names_in(saved)
        same = saved_names is None or names == saved_names or (names is None and config.mask is None)
        by_position = "parameters without names: this optimizer's mask knows them by position"
        named = f"parameters named {_differing(names, saved_names)}" if names else by_position
        require("state_dict", _differing(saved_names, names), same, named)
        group = {**{k: v for k, v in own.items() if k != "params"}, **saved}
        check_group(group)
        require_sampling(group, config.mask is None or config.packing is not None)
        for param, index in zip(own["params"], saved["params"], strict=True):
            if entry := loaded["state"].get(index):
                state[param] = _read_entry(config, param, names_of[param], index, entry)
    return state


def _read_entry(config: Config, param: Tensor, name: str, index: int, entry: dict[str, Any]) -> dict[str, Any]:
    mask, keys = config.mask, config.spec.keys
    expected = f"{config.rule.name}'s {', '.join(keys)}"
    require(f"state_dict: state of parameter {index}", sorted(entry), entry.keys() & {*STATE} == {*keys}, expected)
    step = float(entry["step"])
    require(f"state_dict: step of parameter {index}", step, 0 <= step < 2**32 and step.is_integer(), "in [0, 2**32)")
    words = entry.get(CHILD)
    if words is not None and mask is not None and name in mask:
        same = torch.equal(words.cpu(), mask.words(name).cpu())
        require(f"state_dict: child of {name!r}", "another mask's", same, "of this optimizer's mask")
    shapes = [tuple(param.shape)] if words is None else [tuple(param.shape), (int(ops.popcount_bits(words.cpu())),)]
    for key in (*config.spec.moments, *(entry.keys() & set(COMPANIONS))):
        got, expected = tuple(entry[key].shape), " or ".join(map(str, dict.fromkeys(shapes)))
        require(f"state_dict: {key} of parameter {index}", got, got in shapes, f"shape {expected}")
    entry = unpacked({key: value for key, value in entry.items() if key != CHILD}, words, param)
    return config.spec.converted(name, param, entry)


def canonical_names(loaded: dict[str, Any]) -> Callable[[dict[str, Any]], list[str] | None]:
    """Return a function that gives the canonical names of a saved group, None where it has none."""
    every = [name for group in loaded["param_groups"] for name in group.get("param_names") or ()]
    known = dict(zip(every, canonical(every), strict=True))
    return lambda group: [known[n] for n in group["param_names"]] if group.get("param_names") else None


def _differing(names: list[str] | None, others: list[str] | None) -> str:
    return listed([n for n in names or () if n not in set(others or ())] or list(names or ()))
