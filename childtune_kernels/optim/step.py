"""A step's plan: which tensors go into which op call, checked once and reused while they keep their forms.

Addresses are never kept: every step reads them anew, of tensors whose dtype, device, sizes and strides it has compared
with those that were checked. The optimizer's host time is spent here; see `ops.tensors.forms` for what a look costs.
"""

from __future__ import annotations

from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from .. import ops, philox
from ..errors import require
from ..ops import checks
from ..ops.tensors import IntList, TensorList
from .groups import SAMPLED_CHILD, check_group, hyper_row
from .packing import check_shape
from .state import STATE


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
        self.sizes = group_sizes(optimizer)
        self.idle = [h for h in map(optimizer.gradient_holder, params) if h.grad is None]
        optimizer.require_names()
        wanted = set(params)
        rows: dict[torch.device, list] = {}
        group_of = [index for index, group in enumerate(optimizer.param_groups) for _ in group["params"]]
        for (param, name, _), group in zip(optimizer.named(), group_of, strict=True):
            if param in wanted and (grad := optimizer.gradient_holder(param).grad) is not None:
                checks.check_parameter(f"params: {name!r}", param)
                if optimizer.mask is not None and name in optimizer.mask:
                    check_shape(optimizer.mask, name, param)  # indices and words were made for that
                checks.check_packed_gradient(f"parameter {name!r}", grad, param, optimizer.layout.shape(name, param))
                rows.setdefault(param.device, []).append((param, name, group))
        self.batches = [_Batch(optimizer, device, members) for device, members in rows.items()]
        optimizer.init_state([(p, name) for members in rows.values() for p, name, _ in members])
        for batch in self.batches:
            batch.take_state(optimizer)
        self.entries = list(optimizer.state.values())

    def serves(self, optimizer, params: list[Tensor]) -> bool:
        """Whether this plan still fits: the same parameters, in the same groups, have gradients of the same forms."""
        return (
            len(params) == len(self.params)
            and all(map(is_, params, self.params))
            and group_sizes(optimizer) == self.sizes
            and not any([holder.grad is not None for holder in self.idle])
            and len(optimizer.state) == len(self.entries)
            and all(map(is_, optimizer.state.values(), self.entries))
            and all([batch.fits() for batch in self.batches])
        )

    def fits(self, optimizer) -> bool:
        """Whether a plan of one parameter still fits; its groups are the caller's to compare."""
        (batch,) = self.batches
        return optimizer.state.get(batch.params[0]) is batch.states[0] and batch.fits()

    def run(self, optimizer) -> None:
        """Do the step. What can be refused is refused before the first write."""
        for batch in self.batches:
            batch.take_settings(optimizer)
            batch.require_memory()
        grad_norm = None
        if optimizer.clips and self.batches:
            grad_norm = global_norm([batch.grads for batch in self.batches])
        scaling = (getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None), grad_norm)
        for batch in self.batches:
            batch.launch(optimizer, scaling)


def group_sizes(optimizer) -> list[int]:
    """Return how many parameters each group has: with their flat list, this says which is in which group."""
    return [len(group["params"]) for group in optimizer.param_groups]


class _Batch:
    """One op call: the parameters of one device.

    Its lists of tensors are `TensorList` and have been checked; each step `TensorList.renew`s them.
    """

    def __init__(self, optimizer, device: torch.device, members: list[tuple[Tensor, str, int]]):
        self.device = device
        params, self.names, self.group_of = map(list, zip(*members, strict=True))
        self.params = TensorList.formed(params)
        self.kernels = ops.implementation(optimizer.requested_impl, device.type)
        self.straight = all(p.is_contiguous() and not p.is_neg() for p in params)
        self.has_16_bit = any(p.dtype != torch.float32 for p in params)
        self.holders = [*map(optimizer.gradient_holder, params)]
        self.mask_words = self.indices = None
        if optimizer.packing is not None:
            self.indices = TensorList.formed(optimizer.packing.indices(n, device) for n in self.names)
        elif optimizer.mask is not None:
            none = torch.empty(0, dtype=torch.int32, device=device)  # no words: the whole tensor is in the child
            mask = optimizer.mask
            self.mask_words = TensorList.formed(mask.words(n).to(device) if n in mask else none for n in self.names)
        self.take_gradients([holder.grad for holder in self.holders])
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
            _check_groups(groups)  # of all groups: a plan inside backward has the seed of one only
            own = zip(self.group_of, self.names, strict=True)
            self.keys = IntList(philox.stream_key(seeds[g], name) for g, name in own)
            self.seeds = seeds
        self.lrs = []
        if any([isinstance(g["lr"], Tensor) and g["lr"].is_cuda for g in groups]):
            lrs = [_scalar_on(self.device, group["lr"]) for group in groups]
            self.lrs = [lrs[g] for g in self.group_of]

    def take_state(self, optimizer) -> None:
        """Check the state of all parameters and take it in."""
        layout = optimizer.layout
        self.states = [optimizer.state[p] for p in self.params]
        self.steps, self.exp_avgs, self.exp_avg_sqs = (
            TensorList.formed(map(itemgetter(k), self.states)) for k in STATE
        )
        for name, *tensors in zip(self.names, self.params, self.steps, self.exp_avgs, self.exp_avg_sqs, strict=True):
            checks.check_state(f"state of {name!r}", *tensors, layout.shape(name, tensors[0]))
        for name, index, param, moment in zip(self.names, self.indices or (), self.params, self.exp_avgs, strict=False):
            shape = checks.check_indices(f"indices of {name!r}", index, param, moment)
            expected = tuple(moment.shape)
            fit = shape == expected or index.numel() == moment.numel() == 0
            require(f"indices of {name!r}", shape, fit, f"for moments of {expected}")
        keys = [layout.companion_key(p) for p in self.params]
        self.none = torch.empty(0, dtype=torch.float32, device=self.device)
        self.companion_keys = keys if any(keys) else []
        self.companions = TensorList.formed(self._companions())
        for name, param, companion in zip(self.names, self.params, self.companions, strict=False):
            checks.check_companion(f"companion of {name!r}", companion, param, layout.shape(name, param))

    def _companions(self) -> list[Tensor]:
        """Return the parameters' companions; an empty list where none has one."""
        pairs = zip(self.states, self.companion_keys, strict=False)
        return [state[key] if key else self.none for state, key in pairs]

    def take_gradients(self, grads: list[Tensor]) -> None:
        """Take gradients that have been checked in, as they must lie for the kernels: row by row, signs resolved."""
        self.grads = TensorList.formed(grads)
        self.as_they_lie = all(grad.is_contiguous() and not grad.is_neg() for grad in grads)
        self._straighten()

    def _straighten(self) -> None:
        if not self.as_they_lie:
            self.grads.fill([grad.resolve_neg().contiguous() for grad in self.grads])

    def fits(self) -> bool:
        """Take this step's tensors; return whether all have the forms that were checked.

        What has moved (`module.to(...)`, ``tensor.data = ...``, offloading) and kept its form needs no new plan.
        """
        grads = [holder.grad for holder in self.holders]
        try:
            fit = self.grads.renew(grads) and self.params.renew(self.params)
            for own, key in zip((self.steps, self.exp_avgs, self.exp_avg_sqs), STATE, strict=True):
                fit = fit and own.renew(list(map(itemgetter(key), self.states)))
            fit = fit and self.companions.renew(self._companions())
        except (TypeError, KeyError):  # a gradient is None; an entry of the state lacks something
            return False
        for kept in (self.indices, self.mask_words):
            fit = fit and (kept is None or kept.renew(kept))
        if fit:
            self._straighten()
        return fit

    def require_memory(self) -> None:
        """Refuse tensors whose storage was given back: kernels would write to address 0."""
        for own in (self.params, self.grads, self.steps, self.exp_avgs, self.exp_avg_sqs, self.companions):
            _ = own.addresses

    def launch(self, optimizer, scaling: tuple[Tensor | None, ...]) -> None:
        params = self.params if self.straight else [p.resolve_neg().contiguous() for p in self.params]
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
        if not self.straight:  # element order is row-major: the kernels saw row-major copies
            for param, updated in zip(self.params, params, strict=True):
                if updated is not param:
                    param.copy_(updated)
        ops.mark_written(self.params)
        self.grads.fill([])  # a plan outlives the step; gradients must not


def _check_groups(groups: list[dict[str, Any]]) -> None:
    """Say which group's hyper-parameter is wrong, and how: what a look at all rows at once cannot."""
    for group in groups:
        check_group(group)


def _scalar_on(device: torch.device, lr: float | Tensor) -> Tensor:
    """Return a learning rate as float32 [] there; only a CUDA tensor on a CPU's behalf is waited for."""
    if isinstance(lr, Tensor) and lr.is_cuda:
        return lr.to(device, torch.float32).view(())
    return torch.full((), float(lr), dtype=torch.float32, device=device)
