"""Optimizer state between runs: what a state dict holds, and state of other optimizers and layouts on its way in.

Beside torch's keys, the entry of a parameter that a mask names holds ``child``, its mask words, int32 on the CPU. So
packed state can be read by any optimizer, and is refused by one of another mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops, philox
from .ops.checks import require
from .state import COMPANIONS, MOMENTS, StateLayout, dense

CHILD = "child"


def add_children(optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict whose entries say which child they belong to."""
    if optimizer.mask is None:
        return state_dict
    names = [name for _, name, _ in optimizer.named()]
    state = {
        index: {**entry, CHILD: optimizer.mask.words(names[index]).cpu()} if names[index] in optimizer.mask else entry
        for index, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def without_children(optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict as torch.optim.AdamW has it: parameter-shaped moments, zero outside the child."""
    params = [param for param, _, _ in optimizer.named()]
    state = {}
    for index, entry in state_dict["state"].items():
        full = dense(entry, entry.get(CHILD), params[index])
        state[index] = {key: value for key, value in full.items() if key not in (CHILD, *COMPANIONS)}
    return {**state_dict, "state": state}


def moved_state(optimizer, layout: StateLayout) -> dict[Tensor, dict]:
    """Return the state that an optimizer has, by parameter, in another layout."""
    packing, state = optimizer.packing, {}
    for param, name, _ in optimizer.named():
        if entry := optimizer.state.get(param):
            words = packing.mask.words(name) if packing is not None and name in packing.mask else None
            state[param] = layout.arranged(name, param, dense(entry, words, param))
    return state


def read_state(optimizer, loaded: dict[str, Any]) -> dict[Tensor, dict]:
    """Check a state dict against an optimizer and return its entries, copied, by parameter.

    Raises:
        ValueError: as `ChildAdamW.load_state_dict`.
    """
    sizes = [len(g["params"]) for g in loaded["param_groups"]]
    expected = [len(g["params"]) for g in optimizer.param_groups]
    require("state_dict", f"groups of {sizes}", sizes == expected, f"parameter groups of {expected} parameters")
    names_of = {id(param): name for param, name, _ in optimizer.named()}
    state = {}
    for own, saved in zip(optimizer.param_groups, loaded["param_groups"], strict=True):
        version = saved.get("mask_stream", philox.STREAM_VERSION)
        wanted = f"mask stream version {philox.STREAM_VERSION}"
        require("state_dict", f"version {version}", version == philox.STREAM_VERSION, wanted)
        require("state_dict", "amsgrad state", not saved.get("amsgrad"), "state without amsgrad")
        names, saved_names = own.get("param_names"), saved.get("param_names")
        same = saved_names is None or names == saved_names or (names is None and optimizer.mask is None)
        by_position = "parameters without names: this optimizer's mask knows them by position"
        require("state_dict", saved_names, same, f"parameters named {names}" if names else by_position)
        optimizer.check_group({**{k: v for k, v in own.items() if k != "params"}, **saved})
        for param, index in zip(own["params"], saved["params"], strict=True):
            if entry := loaded["state"].get(index):
                state[param] = _read_entry(optimizer, param, names_of[id(param)], index, entry)
    return state


def _read_entry(optimizer, param: Tensor, name: str, index: int, entry: dict[str, Any]) -> dict[str, Any]:
    complete = entry.keys() >= {"step", *MOMENTS}
    require(f"state_dict: state of parameter {index}", sorted(entry), complete, "AdamW's step, exp_avg, exp_avg_sq")
    words = entry.get(CHILD)
    if words is not None and optimizer.mask is not None and name in optimizer.mask:
        same = torch.equal(words.cpu(), optimizer.mask.words(name).cpu())
        require(f"state_dict: child of {name!r}", "another mask's", same, "of this optimizer's mask")
    shapes = [tuple(param.shape)] if words is None else [tuple(param.shape), (int(ops.popcount_bits(words.cpu())),)]
    for key in (*MOMENTS, *(entry.keys() & set(COMPANIONS))):
        got, expected = tuple(entry[key].shape), " or ".join(map(str, dict.fromkeys(shapes)))
        require(f"state_dict: {key} of parameter {index}", got, got in shapes, f"shape {expected}")
    entry = dense({key: value for key, value in entry.items() if key != CHILD}, words, param)
    return optimizer.layout.arranged(name, param, entry)
