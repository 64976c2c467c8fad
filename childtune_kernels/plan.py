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
from .ops.checks import require
from .ops.fixed import Fixed, addresses
from .state import STATE

SAMPLED_CHILD = "1 where a mask is given, or the state packed: F inside D needs state='packed'"


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


def hyper_row(group: dict[str, Any], dialect: str, max_grad_norm: float | None) -> tuple[float, ...]:
    """Return a group's row of the ops' hyper table, in the order of `ops.HYPER_COLUMNS`."""
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
    )


def global_norm(lists: list[list[Tensor]]) -> Tensor:
    """Return the L2 norm over all lists, float32 [], on the first list's device, without waiting for any device."""
    norms = [torch.linalg.vector_norm(torch.stack(torch._foreach_norm(ts, 2, dtype=torch.float32))) for ts in lists]
    return (
        norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
    )


class Plan:
    """The parameters that have gradients, by device; one op call each. Making a plan checks everything.

    Raises:
        RuntimeError, TypeError, ValueError: a parameter, gradient, state tensor or hyper-parameter is not what the
            kernels take. Nothing has been changed then.
    """

    def __init__(self, optimizer, params: list[Tensor]):
        self.params = params
        self.idle = [h for h in map(optimizer.gradient_holder, params) if h.grad is None]
        wanted = set(params)
        rows: dict[torch.device, list] = {}
        group_of = [index for index, group in enumerate(optimizer.param_groups) for _ in group["params"]]
        for (param, name, _), group in zip(optimizer.named(), group_of, strict=True):
            if param in wanted and (grad := optimizer.gradient_holder(param).grad) is not None:
                checks.check_parameter(f"params: {name!r}", param)
                checks.check_packed_gradient(f"parameter {name!r}", grad, param, optimizer.layout.shape(name, param))
                rows.setdefault(param.device, []).append((param, name, group))
        self.batches = [_Batch(optimizer, device, members) for device, members in rows.items()]
        optimizer.init_state([(p, name) for members in rows.values() for p, name, _ in members])
        for batch in self.batches:
            batch.take_state(optimizer)
            batch.fits()
        self.entries = list(optimizer.state.values())

    def serves(self, optimizer, params: list[Tensor]) -> bool:
        """Whether this plan still fits: nothing was replaced or moved, and the same parameters have gradients."""
        return (
            len(params) == len(self.params)
            and all(map(is_, params, self.params))
            and not any([holder.grad is not None for holder in self.idle])
            and len(optimizer.state) == len(self.entries)
            and all(map(is_, optimizer.state.values(), self.entries))
            and all([batch.fits() for batch in self.batches])
        )

    def fits(self, optimizer) -> bool:
        """Whether a plan of one parameter still fits."""
        (batch,) = self.batches
        return optimizer.state.get(batch.params[0]) is batch.states[0] and batch.fits()

    def run(self, optimizer) -> None:
        """Do the step. What can be refused is refused before the first write."""
        for batch in self.batches:
            batch.take_settings(optimizer)
        grad_norm = None
        if optimizer.max_grad_norm is not None and self.batches:
            grad_norm = global_norm([batch.grads for batch in self.batches])
        scaling = (getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None), grad_norm)
        for batch in self.batches:
            batch.launch(optimizer, scaling)


class _Batch:
    """One op call: the parameters of one device."""

    def __init__(self, optimizer, device: torch.device, members: list[tuple[Tensor, str, int]]):
        self.device = device
        params, self.names, self.group_of = map(list, zip(*members, strict=True))
        self.params = Fixed(params)
        self.kernels = ops.implementation(optimizer.requested_impl, device.type)
        self.contiguous = all(p.is_contiguous() for p in params)
        self.has_16_bit = any(p.dtype != torch.float32 for p in params)
        self.holders = [*map(optimizer.gradient_holder, params)]
        self.mask_words = self.indices = None
        if optimizer.packing is not None:
            self.indices = Fixed(optimizer.packing.indices(n, device) for n in self.names)
        elif optimizer.mask is not None:
            none = torch.empty(0, dtype=torch.int32, device=device)  # no words: the whole tensor is in the child
            mask = optimizer.mask
            self.mask_words = Fixed(mask.words(n).to(device) if n in mask else none for n in self.names)
        self.rows: list | None = None
        self.seeds: list | None = None
        self.take_settings(optimizer)

    def take_settings(self, optimizer) -> None:
        """Rebuild the hyper table where a scheduler or the user changed something."""
        groups = optimizer.param_groups
        try:
            rows = [hyper_row(group, optimizer.dialect, optimizer.max_grad_norm) for group in groups]
            table = None if rows == self.rows else torch.tensor(rows, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            _check_groups(groups)
            raise
        if table is not None:
            p = table[:, ops.HYPER_COLUMNS.index("reserve_p")]
            if not ((table[:, :5] >= 0).all() and (table[:, 1:3] < 1).all() and ((p >= 2**-32) & (p <= 1)).all()):
                _check_groups(groups)
            self.hyper = table[self.group_of]
            self.random = bool((p < 1).any())
            both = self.random and self.mask_words is not None
            require("reserve_p", p.tolist(), not both, SAMPLED_CHILD)
            self.rows = rows
        seeds = [group["seed"] for group in groups]
        if seeds != self.seeds:
            own = zip(self.group_of, self.names, strict=True)
            self.keys = Fixed(philox.stream_key(seeds[g], name) for g, name in own)
            self.seeds = seeds
        self.lrs = []
        if any([isinstance(g["lr"], Tensor) and g["lr"].is_cuda for g in groups]):
            lrs = [_scalar_on(self.device, group["lr"]) for group in groups]
            self.lrs = [lrs[g] for g in self.group_of]

    def take_state(self, optimizer) -> None:
        layout = optimizer.layout
        self.states = [optimizer.state[p] for p in self.params]
        self.steps, self.exp_avgs, self.exp_avg_sqs = (Fixed(map(itemgetter(k), self.states)) for k in STATE)
        for name, *tensors in zip(self.names, self.params, self.steps, self.exp_avgs, self.exp_avg_sqs, strict=True):
            checks.check_state(f"state of {name!r}", *tensors, layout.shape(name, tensors[0]))
        keys = [layout.companion_key(p) for p in self.params]
        none = torch.empty(0, dtype=torch.float32, device=self.device)
        self.companions = Fixed(s[key] if key else none for s, key in zip(self.states, keys, strict=True))
        for name, param, companion in zip(self.names, self.params, self.companions, strict=True):
            checks.check_companion(f"companion of {name!r}", companion, param, layout.shape(name, param))
        self.companion_keys = keys if any(keys) else []
        self.companions = self.companions if any(keys) else Fixed()

    def fits(self) -> bool:
        """Take this step's gradients; return whether they and everything else are as they were checked.

        Addresses tell what `module.to(...)`, `p.data = ...` or offloading of the state moved; torch itself sees to
        the shape and device of a gradient, but not always to its dtype (`grad_dtype`).
        """
        grads = [holder.grad for holder in self.holders]
        try:
            if [g.dtype for g in grads] != self.params.dtypes:
                return False
            if not all(map(Tensor.is_contiguous, grads)):
                if any(g.layout != torch.strided for g in grads):
                    return False
                grads = [g.contiguous() for g in grads]
        except (AttributeError, RuntimeError):  # a gradient is None, or of a sparse layout that has no strides
            return False
        self.grads = Fixed(grads)
        steps, exp_avgs, exp_avg_sqs = (list(map(itemgetter(key), self.states)) for key in STATE)
        return (
            _unmoved(self.params, self.params)
            and _unmoved(exp_avgs, self.exp_avgs)
            and all(map(is_, exp_avg_sqs, self.exp_avg_sqs))
            and all(map(is_, steps, self.steps))
            and all([c is (s[key] if key else c) for c, s, key in self._accompanied()])
        )

    def _accompanied(self):
        return zip(self.companions, self.states, self.companion_keys, strict=False)

    def launch(self, optimizer, scaling: tuple[Tensor | None, ...]) -> None:
        params = self.params if self.contiguous else [p.contiguous() for p in self.params]
        lists = (params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.steps, self.hyper)
        ahead = self.device.type == "cuda"  # a copy to the CPU must be waited for before it is read
        scaling = [None if x is None else x.to(self.device, torch.float32, non_blocking=ahead) for x in scaling]
        stochastic = optimizer.low_precision == "stochastic" and self.has_16_bit
        low = (self.companions, self.keys if stochastic else ())
        if self.indices is not None:
            self.kernels.adamw_compact_(*lists, self.indices, self.keys, *low, self.lrs, *scaling)
        elif self.mask_words is not None:
            self.kernels.adamw_masked_(*lists, self.mask_words, optimizer.decay == "all", self.lrs, *scaling)
        elif self.random:
            self.kernels.adamw_bernoulli_(*lists, self.keys, *low, self.lrs, *scaling)
        else:
            self.kernels.adamw_(*lists, *low, self.lrs, *scaling)
        if not self.contiguous:  # element order is row-major: the kernels saw row-major copies
            for param, updated in zip(self.params, params, strict=True):
                if updated is not param:
                    param.copy_(updated)
        ops.mark_written(self.params)
        del self.grads  # a plan outlives the step; gradients must not


def _check_groups(groups: list[dict[str, Any]]) -> None:
    """Say which group's hyper-parameter is wrong, and how: what a look at all rows at once cannot."""
    for group in groups:
        check_group(group)


def _scalar_on(device: torch.device, lr: float | Tensor) -> Tensor:
    """Return a learning rate as float32 [] there; only a CUDA tensor on a CPU's behalf is waited for."""
    if isinstance(lr, Tensor) and lr.is_cuda:
        return lr.to(device, torch.float32).view(())
    return torch.full((), float(lr), dtype=torch.float32, device=device)


def _unmoved(tensors: list[Tensor], checked: Fixed) -> bool:
    return bool((addresses(tensors) == checked.addresses).all())
