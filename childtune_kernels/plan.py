"""A step's plan: which tensors go into which op call, checked once and reused while only gradients change.

The optimizer's host time is spent here: 393 tensors cost about 25 us a look at one attribute of each, so a step
looks only at what may have moved since the plan was made.
"""

from __future__ import annotations

import math
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from . import ops, philox
from .ops import checks

MOMENTS = ("exp_avg", "exp_avg_sq")


def require(name: str, got: Any, ok: bool, expected: str) -> None:
    """Raise ValueError, naming the argument, what was expected and what came, unless ``ok``."""
    if not ok:
        raise ValueError(f"{name} must be {expected}, got {got!r}")


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
        numbers["lr"] = float(lr)
    require("betas", betas, len(betas) == 2, "a pair")
    numbers.update({"betas[0]": betas[0], "betas[1]": betas[1]})
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {value!r}")
        require(name, value, value >= 0, "at least 0")
    for name in ("betas[0]", "betas[1]"):
        require(name, numbers[name], numbers[name] < 1, "in [0, 1)")
    require("reserve_p", group["reserve_p"], 2**-32 <= group["reserve_p"] <= 1, "in (0, 1], at least 2**-32")
    philox.stream_key(group["seed"], "")


def hyper_row(group: dict[str, Any], dialect: str, max_grad_norm: float | None) -> tuple[float, ...]:
    """Return a group's row of the ops' hyper table, in the order of `ops.HYPER_COLUMNS`."""
    lr = group["lr"]
    return (
        0.0 if isinstance(lr, Tensor) and lr.is_cuda else float(lr),  # a CUDA lr is read by the kernels
        *group["betas"],
        group["eps"],
        group["weight_decay"],
        group["reserve_p"],
        -1.0 if group["maximize"] else 1.0,
        float(dialect == "hf"),
        math.inf if max_grad_norm is None else max_grad_norm,
    )


def global_norm(lists: list[list[Tensor]]) -> Tensor:
    """Return the L2 norm over all lists, float32 [], on the first list's device, without waiting for any device."""
    norms = [torch.linalg.vector_norm(torch.stack(torch._foreach_norm(ts, 2, dtype=torch.float32))) for ts in lists]
    return (
        norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
    )


class Plan:
    """The parameters that have gradients, by device; one op call each.

    Raises:
        RuntimeError, TypeError: a parameter, gradient or state tensor is not what the kernels take.
    """

    def __init__(self, optimizer, params: list[Tensor], grads: list[Tensor | None]):
        self.params = params
        self.without_grad = [g is None for g in grads]
        rows: dict[torch.device, list] = {}
        group_of = [index for index, group in enumerate(optimizer.param_groups) for _ in group["params"]]
        for position, (param, name, _) in enumerate(optimizer.named()):
            if grads[position] is not None:
                checks.check_parameter(f"params: {name!r}", param)
                checks.check_gradient(f"parameter {name!r}", grads[position], param)
                rows.setdefault(param.device, []).append((position, param, name, group_of[position]))
        self.batches = [_Batch(optimizer, device, members) for device, members in rows.items()]

    def serves(self, params: list[Tensor], grads: list[Tensor | None]) -> bool:
        """Whether this plan still fits: the same parameters, in place, and the same ones with gradients."""
        return (
            len(params) == len(self.params)
            and all(map(is_, params, self.params))
            and [g is None for g in grads] == self.without_grad
            and all(batch.fits(grads) for batch in self.batches)
        )

    def run(self, optimizer, grads: list[Tensor | None]) -> None:
        """Do the step. Everything that can be refused is refused before the first write."""
        for batch in self.batches:
            batch.prepare(optimizer, grads)
        grad_norm = None
        if optimizer.max_grad_norm is not None and self.batches:
            grad_norm = global_norm([batch.grads for batch in self.batches])
        scaling = (getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None), grad_norm)
        for batch in self.batches:
            batch.launch(optimizer, scaling)


class _Batch:
    """One op call: the parameters of one device."""

    def __init__(self, optimizer, device: torch.device, members: list[tuple[int, Tensor, str, int]]):
        self.device = device
        self.positions, self.params, self.names, self.group_of = map(list, zip(*members, strict=True))
        self.kernels = ops.implementation(optimizer.requested_impl, device.type)
        self.layout = _layout(self.params)
        self.dtypes = [p.dtype for p in self.params]
        self.layouts = [torch.strided] * len(self.params)
        self.contiguous = all(p.is_contiguous() for p in self.params)
        self.mask_words = None
        if optimizer.mask is not None:
            none = torch.empty(0, dtype=torch.int32, device=device)  # no words: the whole tensor is in the child
            mask = optimizer.mask
            self.mask_words = [mask.words(n).to(device) if n in mask else none for n in self.names]
        self.moments: list[Tensor] = []
        self.settings: tuple | None = None

    def fits(self, grads: list[Tensor | None]) -> bool:
        own = [grads[i] for i in self.positions]
        return (
            _layout(self.params) == self.layout
            and [g.dtype for g in own] == self.dtypes
            and [g.layout for g in own] == self.layouts
        )

    def prepare(self, optimizer, grads: list[Tensor | None]) -> None:
        """Gather what the op takes, without changing anything but missing state."""
        own = [grads[i] for i in self.positions]
        self.grads = [g if g.is_contiguous() else g.contiguous() for g in own]
        missing = [p for p in self.params if not optimizer.state.get(p)]
        if missing:
            optimizer.init_state(missing)
        states = [optimizer.state[p] for p in self.params]
        self.steps, self.exp_avgs, self.exp_avg_sqs = (list(map(itemgetter(k), states)) for k in ("step", *MOMENTS))
        moments = self.steps + self.exp_avgs + self.exp_avg_sqs
        if len(moments) != len(self.moments) or not all(map(is_, moments, self.moments)):
            for name, *tensors in zip(
                self.names, self.params, self.steps, self.exp_avgs, self.exp_avg_sqs, strict=True
            ):
                checks.check_state(f"state of {name!r}", *tensors)
            self.moments = moments
        self._take_settings(optimizer)

    def _take_settings(self, optimizer) -> None:
        """Rebuild the hyper table where a scheduler or the user changed something."""
        groups = optimizer.param_groups
        rows = [hyper_row(group, optimizer.dialect, optimizer.max_grad_norm) for group in groups]
        settings = (rows, [group["seed"] for group in groups])
        if settings != self.settings:
            table = torch.tensor(rows, dtype=torch.float64)
            betas = table[:, 1:3]
            p = table[:, 5]
            if not ((table[:, :5] >= 0).all() and (betas < 1).all() and ((p > 0) & (p <= 1)).all()):
                for group in groups:
                    check_group(group)  # says which one it is
            self.hyper = table[self.group_of]
            self.random = bool((p < 1).any())
            require("reserve_p", p.tolist(), not (self.random and self.mask_words), "1 where a mask is given")
            seeds = [groups[g]["seed"] for g in self.group_of]
            self.keys = [philox.stream_key(seed, name) for seed, name in zip(seeds, self.names, strict=True)]
            self.settings = settings
        self.lrs = []
        if (
            any(isinstance(group["lr"], Tensor) and group["lr"].is_cuda for group in groups)
            and self.device.type == "cuda"
        ):
            lrs = [torch.as_tensor(group["lr"]).to(self.device, torch.float32).view(()) for group in groups]
            self.lrs = [lrs[g] for g in self.group_of]

    def launch(self, optimizer, scaling: tuple[Tensor | None, ...]) -> None:
        params = self.params if self.contiguous else [p.contiguous() for p in self.params]
        lists = (params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.steps, self.hyper)
        scaling = [None if x is None else x.to(self.device, torch.float32, non_blocking=True) for x in scaling]
        if self.mask_words is not None:
            self.kernels.adamw_masked_(*lists, self.mask_words, optimizer.decay == "all", self.lrs, *scaling)
        elif self.random:
            self.kernels.adamw_bernoulli_(*lists, self.keys, self.lrs, *scaling)
        else:
            self.kernels.adamw_(*lists, self.lrs, *scaling)
        if not self.contiguous:  # element order is row-major: the kernels saw row-major copies
            for param, updated in zip(self.params, params, strict=True):
                if updated is not param:
                    param.copy_(updated)
        ops.mark_written(self.params)
        del self.grads  # a plan outlives the step; gradients must not


def _layout(params: list[Tensor]) -> tuple[list, ...]:
    """What `p.data = ...` or `module.to(...)` may change without replacing the parameter object."""
    return (
        [p.dtype for p in params],
        [p.numel() for p in params],
        [p.get_device() for p in params],
        [p.is_contiguous() for p in params],
    )
