"""Parameter groups: which hyper-parameters are right, and by which names their parameters are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from .. import philox
from ..errors import require
from ..names import canonical, common_prefix, listed, unwrapped

SAMPLED_CHILD = "1 where a mask is given, or the state packed: F inside D needs state='packed'"


class Member(NamedTuple):
    """A parameter of an optimizer, its canonical name, and the group it is in."""

    param: Tensor
    name: str
    group: dict[str, Any]


def check_group(group: dict[str, Any]) -> None:
    """Refuse hyper-parameters out of range.

    Raises:
        TypeError, ValueError: naming the hyper-parameter, what was expected and what came.
    """
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor):
        require("lr", f"a tensor of shape {tuple(lr.shape)}", lr.numel() == 1, "a float or a tensor of one element")
    numbers = {"eps": group["eps"], "weight_decay": group["weight_decay"], "reserve_p": group["reserve_p"]}
    if not (isinstance(lr, Tensor) and lr.is_cuda):  # looking into a CUDA tensor would wait for the device
        numbers["lr"] = float(lr) if isinstance(lr, Tensor) else lr
    require("betas", betas, isinstance(betas, (tuple, list)) and len(betas) == 2, "a pair")
    numbers.update({"betas[0]": betas[0], "betas[1]": betas[1]})
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {value!r}")
        require(name, value, value >= 0, "at least 0")
    for name in ("betas[0]", "betas[1]"):
        require(name, numbers[name], numbers[name] < 1, "in [0, 1)")
    require("reserve_p", group["reserve_p"], 2**-32 <= group["reserve_p"] <= 1, "in (0, 1], at least 2**-32")
    philox.stream_key(group["seed"], "")


def require_sampling(group: dict[str, Any], can_sample: bool) -> None:
    """Refuse F's sampling where the child's state is dense.

    Raises:
        ValueError: a group's ``reserve_p`` is below 1 there.
    """
    require("reserve_p", group["reserve_p"], group["reserve_p"] == 1 or can_sample, SAMPLED_CHILD)


def hyper_row(
    group: dict[str, Any], dialect: str, max_grad_norm: float | None, decay_outside: bool
) -> tuple[float, ...]:
    """Return a group's row of `ops.Update.hyper`, in the order of `ops.HYPER_COLUMNS`."""
    lr = group["lr"]
    beta1, beta2 = group["betas"]
    return (
        (0.0 if lr.is_cuda else lr.item()) if isinstance(lr, Tensor) else lr,  # a CUDA lr is read by the kernels
        beta1,
        beta2,
        group["eps"],
        group["weight_decay"],
        group["reserve_p"],
        -1.0 if group["maximize"] else 1.0,
        float(dialect == "hf"),
        math.inf if max_grad_norm is None else max_grad_norm,
        float(decay_outside),
    )


def group_sizes(groups: list[dict[str, Any]]) -> list[int]:
    """Return how many parameters each group has: with their flat list, this says which is in which group."""
    return [len(group["params"]) for group in groups]


class ParameterNames:
    """By which name each parameter of an optimizer is known: its canonical name, or without names its position.

    A name stays with its tensor when the user moves that between groups. A position does not: where names matter,
    `require_in_place` refuses those that have another one than they began with.
    """

    def __init__(self):
        self.prefix = ""  # DistributedDataParallel's, of the names that the optimizer was made with
        self.known: dict[Tensor, str] = {}

    def unwrap(self, params: Any) -> Any:
        """Return the constructor's parameters, or parameter groups, by canonical names.

        Raises:
            TypeError: they are in no order.
            ValueError: two names become one.
        """
        if isinstance(params, (set, frozenset)):
            raise TypeError("params must be in order, because positions name parameters, got a set")
        if isinstance(params, (Tensor, Mapping, str)):
            return params  # torch says what is wrong
        groups = list(params)
        if groups and not isinstance(groups[0], Mapping):
            groups = [{"params": groups}]
        groups = [_listed_params(group) for group in groups]
        names = [name for group in groups for name in _names(group)]
        self.prefix = common_prefix([unwrapped(name) for name in names])
        renamed = iter(canonical(names))
        return [_renamed(group, lambda _: next(renamed)) for group in groups]

    def add(self, group: Any) -> Any:
        """Return a later group by canonical names; which wrapper the first ones had is settled."""
        return _renamed(_listed_params(group), lambda name: unwrapped(name).removeprefix(self.prefix))

    def members(self, groups: list[dict[str, Any]]) -> list[Member]:
        """Return all parameters of the groups, in order."""
        members, position = [], 0
        for group in groups:
            own = group.get("param_names")
            for i, param in enumerate(group["params"]):
                members.append(Member(param, str(position) if own is None else self._name(param, own, i), group))
                position += 1
        return members

    def _name(self, param: Tensor, names: list[str], i: int) -> str:
        name = self.known.get(param, names[i] if i < len(names) else None)
        expected = "added by add_param_group, with a name: the others have names"
        require("params", f"a tensor of shape {tuple(param.shape)} without one", name is not None, expected)
        return name

    def settle(self, groups: list[dict[str, Any]]) -> None:
        """Remember names and first positions, and write the names where torch has them."""
        self.known = {param: self.known.get(param, name) for param, name, _ in self.members(groups)}
        for group in groups:
            if "param_names" in group:
                group["param_names"] = [self.known[param] for param in group["params"]]

    def require_in_place(self, groups: list[dict[str, Any]]) -> None:
        """Refuse parameters known by position that have another position now.

        Raises:
            RuntimeError: naming them.
        """
        members = self.members(groups)
        moved = [f"{self.known[p]} to {name}" for p, name, _ in members if self.known.get(p, name) != name]
        if moved:
            raise RuntimeError(
                "without names, masks know parameters by their positions, which must stay; moved: "
                f"{listed(moved)}: pass model.named_parameters()"
            )


def _listed_params(group: Any) -> Any:
    """Return a group whose parameters can be looked through more than once; torch refuses what has none."""
    if not isinstance(group, Mapping) or "params" not in group or isinstance(group["params"], (Tensor, set, frozenset)):
        return group
    return {**group, "params": list(group["params"])}


def _names(group: Any) -> list[str]:
    entries = group["params"] if isinstance(group, Mapping) and isinstance(group.get("params"), list) else ()
    return [entry[0] for entry in entries if _is_named(entry)]


def _renamed(group: Any, rename: Callable[[str], str]) -> Any:
    if not _names(group):
        return group
    return {**group, "params": [(rename(e[0]), *e[1:]) if _is_named(e) else e for e in group["params"]]}


def _is_named(entry: Any) -> bool:
    return isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)
