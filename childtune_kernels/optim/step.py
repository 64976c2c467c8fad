"""A step: which tensors go into which update, checked once and used again while they keep their forms.

Addresses are never kept: every step reads them anew, of tensors whose dtype, device, sizes and strides it has compared
with those that were checked. The optimizer's host time is spent here; see `ops.tensors.forms` for what a look costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from operator import is_, itemgetter
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import ops, philox
from ..errors import require
from ..ops import IntList, Scaling, TensorList, Update, checks
from .config import Config
from .groups import SAMPLED_CHILD, Member, check_group, group_sizes, hyper_row
from .packing import check_shape

Groups = list[dict[str, Any]]
State = dict[Tensor, dict[str, Any]]


class GradientHolder(Protocol):
    """What has a parameter's gradient: the parameter itself or, where gradients are packed, its hook."""

    grad: Tensor | None


def global_norm(lists: list[TensorList]) -> Tensor:
    """Return the L2 norm over all lists, float32 [], on the first list's device, without waiting for any device."""
    norms = [torch.linalg.vector_norm(torch.stack(torch._foreach_norm(ts, 2, dtype=torch.float32))) for ts in lists]
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


class Step:
    """The parameters that have gradients, by device; one update each. Making a step checks everything.

    Args:
        config: the optimizer's.
        members: parameters that this step is to serve, with or without a gradient.
        groups: all groups of the optimizer.
        state: the optimizer's; what members with a gradient lack of theirs is added to it.
        holder: gives what has a parameter's gradient.

    Raises:
        RuntimeError, TypeError, ValueError: a parameter, gradient, state tensor or hyper-parameter is not what the
            kernels take. Nothing has been changed then.
    """

    def __init__(
        self,
        config: Config,
        members: list[Member],
        groups: Groups,
        state: State,
        holder: Callable[[Tensor], GradientHolder],
    ):
        self.config = config
        self.params = [member.param for member in members]
        self.sizes = group_sizes(groups)
        self.idle = [h for h in map(holder, self.params) if h.grad is None]
        by_device: dict[torch.device, list[Member]] = {}
        for member in members:
            if (grad := holder(member.param).grad) is not None:
                self._check(member, grad)
                by_device.setdefault(member.param.device, []).append(member)
        self.parts = [_DeviceStep(config, device, own, groups, holder) for device, own in by_device.items()]
        state.update(config.spec.missing([member for own in by_device.values() for member in own], state))
        for part in self.parts:
            part.bind_state(state)
        self.entries = list(state.values())

    def _check(self, member: Member, grad: Tensor) -> None:
        param, name, _ = member
        checks.check_parameter(f"params: {name!r}", param)
        if self.config.mask is not None and name in self.config.mask:
            check_shape(self.config.mask, name, param)  # indices and words were made for that
        checks.check_packed_gradient(f"parameter {name!r}", grad, param, self.config.spec.shape(name, param))

    def renew(self, params: list[Tensor], groups: Groups, state: State) -> bool:
        """Take this step's tensors; return whether they are of the same forms, and parameters in the same groups."""
        return (
            len(params) == len(self.params)
            and all(map(is_, params, self.params))
            and group_sizes(groups) == self.sizes
            and not any([holder.grad is not None for holder in self.idle])
            and len(state) == len(self.entries)
            and all(map(is_, state.values(), self.entries))
            and all([part.renew() for part in self.parts])
        )

    def renew_alone(self, param: Tensor, state: State) -> bool:
        """`renew` of one parameter's step; its groups are the caller's to compare."""
        (part,) = self.parts
        return state.get(param) is part.entries[0] and part.renew()

    def run(self, groups: Groups, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """Do the step. What can be refused is refused before the first write."""
        for part in self.parts:
            part.refresh_hyper(groups)
            part.require_memory()
        clips = self.config.clips and self.parts
        grad_norm = global_norm([part.grads for part in self.parts]) if clips else None
        for part in self.parts:
            part.launch(Scaling(grad_scale, found_inf, grad_norm))


class Steps:
    """The steps that can be taken again: one of all parameters or, inside backward, one a parameter."""

    def __init__(self):
        self.together: Step | None = None
        self.alone: dict[Tensor, Step] = {}
        self.alone_for: tuple[list[Tensor], list[int]] = ([], [])  # parameters and groups that these were made for

    def take(
        self,
        groups: Groups,
        state: State,
        make: Callable[[list[Tensor]], Step],
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Take the step of all parameters that have gradients; ``make`` makes one where none fits."""
        params = _params(groups)
        if self.together is None or not self.together.renew(params, groups, state):
            self.together = make(params)
        self.together.run(groups, grad_scale, found_inf)

    def take_alone(
        self, param: Tensor, is_first: bool, groups: Groups, state: State, make: Callable[[list[Tensor]], Step]
    ) -> None:
        """Take one parameter's step; ``is_first`` of those of a backward pass, before which groups may have changed."""
        if is_first:
            params, sizes = _params(groups), group_sizes(groups)
            known, known_sizes = self.alone_for
            if sizes != known_sizes or len(params) != len(known) or not all(map(is_, params, known)):
                self.alone, self.alone_for = {}, (params, sizes)
        step = self.alone.get(param)
        if step is None or not step.renew_alone(param, state):
            step = self.alone[param] = make([param])
        step.run(groups)


class _DeviceStep:
    """One update: the parameters of one device.

    Its lists of tensors know the forms that were checked; each step `TensorList.renew`s them.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        members: list[Member],
        groups: Groups,
        holder: Callable[[Tensor], GradientHolder],
    ):
        self.config, self.device = config, device
        params, self.names, _ = map(list, zip(*members, strict=True))
        index_of = {id(group): index for index, group in enumerate(groups)}
        self.group_of = [index_of[id(member.group)] for member in members]
        self.params = TensorList.formed(params)
        self.kernels = ops.implementation(config.impl, device.type)
        self.are_straight = all(p.is_contiguous() and not p.is_neg() for p in params)
        self.has_16_bit = any(p.dtype != torch.float32 for p in params)
        self.holders = [*map(holder, params)]
        self.mask_words, self.indices = self._child()
        self.grads = TensorList.formed(holder.grad for holder in self.holders)
        self.grads_are_straight = all(grad.is_contiguous() and not grad.is_neg() for grad in self.grads)
        self._straighten()
        self.rows: list | None = None
        self.seeds: list | None = None
        self.refresh_hyper(groups)

    def _child(self) -> tuple[TensorList, TensorList]:
        """Return mask words and indices; one of them, or both, empty."""
        mask, packing = self.config.mask, self.config.packing
        if packing is not None:
            return TensorList.formed([]), TensorList.formed(packing.indices(n, self.device) for n in self.names)
        if mask is None:
            return TensorList.formed([]), TensorList.formed([])
        none = torch.empty(0, dtype=torch.int32, device=self.device)  # no words: the whole tensor is in the child
        words = (mask.words(name).to(self.device) if name in mask else none for name in self.names)
        return TensorList.formed(words), TensorList.formed([])

    def refresh_hyper(self, groups: Groups) -> None:
        """Rebuild the hyper table where a scheduler or the user changed something."""
        config = self.config
        try:
            outside = config.decay == "all"
            rows = [hyper_row(group, config.dialect, config.max_grad_norm, outside) for group in groups]
            table = None if rows == self.rows else torch.tensor(rows, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            _check_groups(groups)
            raise
        if table is not None:
            p = table[:, ops.HYPER_COLUMNS.index("reserve_p")]
            if not ((table[:, :5] >= 0).all() and (table[:, 1:3] < 1).all() and ((p >= 2**-32) & (p <= 1)).all()):
                _check_groups(groups)
            random = bool((p < 1).any())
            require("reserve_p", p.tolist(), not (random and self.mask_words), SAMPLED_CHILD)
            self.hyper, self.random, self.rows = table[self.group_of], random, rows
        seeds = [group["seed"] for group in groups]
        if seeds != self.seeds:
            _check_groups(groups)  # of all groups: a step inside backward has the seed of one only
            own = zip(self.group_of, self.names, strict=True)
            self.keys = IntList(philox.stream_key(seeds[g], name) for g, name in own)
            self.seeds = seeds
        self.is_stochastic = self.has_16_bit and config.rounding(groups) == "stochastic"
        self.lrs = []
        if any([isinstance(g["lr"], Tensor) and g["lr"].is_cuda for g in groups]):
            lrs = [_scalar_on(self.device, group["lr"]) for group in groups]
            self.lrs = [lrs[g] for g in self.group_of]

    def bind_state(self, state: State) -> None:
        """Check the state of all parameters and take it in."""
        spec = self.config.spec
        self.entries = [state[p] for p in self.params]
        for name, param, entry in zip(self.names, self.params, self.entries, strict=True):
            spec.check(name, param, entry)
        for name, index, param, entry in zip(self.names, self.indices, self.params, self.entries, strict=False):
            moment = entry["exp_avg"]
            shape, expected = checks.check_indices(f"indices of {name!r}", index, param, moment), tuple(moment.shape)
            fit = shape == expected or index.numel() == moment.numel() == 0
            require(f"indices of {name!r}", shape, fit, f"for moments of {expected}")
        keys = [spec.companion_key(param.dtype) for param in self.params]
        self.companion_keys = keys if any(keys) else []
        self.none = torch.empty(0, dtype=torch.float32, device=self.device)
        none = TensorList.formed([])
        own = {key: TensorList.formed(map(itemgetter(key), self.entries)) for key in spec.keys}
        self.own = list(own.items())
        self.update = Update(
            self.params,
            self.grads,
            own.get("exp_avg", none),
            own.get("exp_avg_sq", none),
            own["step"],
            self.hyper,
            indices=self.indices,
            mask_words=self.mask_words,
            companions=TensorList.formed(self._companions()),
            rule=self.config.rule,
        )

    def _companions(self) -> list[Tensor]:
        """Return the parameters' companions; an empty list where none has one."""
        pairs = zip(self.entries, self.companion_keys, strict=False)
        return [entry[key] if key else self.none for entry, key in pairs]

    def _straighten(self) -> None:
        """Lay gradients as kernels take them, row by row, signs resolved."""
        if not self.grads_are_straight:
            self.grads.fill([grad.resolve_neg().contiguous() for grad in self.grads])

    def renew(self) -> bool:
        """Take this step's tensors; return whether all have the forms that were checked.

        What has moved (`module.to(...)`, ``tensor.data = ...``, offloading) and kept its form needs no new step.
        """
        update = self.update
        try:
            fit = self.grads.renew([holder.grad for holder in self.holders]) and self.params.renew(self.params)
            for key, own in self.own:
                fit = fit and own.renew(list(map(itemgetter(key), self.entries)))
            fit = fit and update.companions.renew(self._companions())
        except (TypeError, KeyError):  # a gradient is None; an entry of the state lacks something
            return False
        fit = fit and self.indices.renew(self.indices) and self.mask_words.renew(self.mask_words)
        if fit:
            self._straighten()
        return fit

    def require_memory(self) -> None:
        """Refuse tensors whose storage was given back: kernels would write to address 0."""
        for tensors in (self.grads, *self.update.written):
            _ = tensors.addresses

    def launch(self, scaling: Scaling) -> None:
        """Run the update, on copies of parameters that do not lie row by row."""
        update = self.update
        ahead = self.device.type == "cuda"  # a copy to the CPU must be waited for before it is read
        update.scaling = Scaling(
            *[x if x is None else x.to(self.device, torch.float32, non_blocking=ahead) for x in scaling]
        )
        update.hyper, update.lrs = self.hyper, TensorList.of(self.lrs)
        update.mask_keys = self.keys if self.random else IntList()
        update.rounding_keys = self.keys if self.is_stochastic else IntList()
        if self.are_straight:
            self.kernels.update_(update)
        else:  # element order is row-major: the kernels see row-major copies
            copies = TensorList(param.resolve_neg().contiguous() for param in self.params)
            self.kernels.update_(replace(update, params=copies))
            for param, updated in zip(self.params, copies, strict=True):
                if updated is not param:
                    param.copy_(updated)
        ops.mark_written(self.params)
        self.grads.fill([])  # a step is kept for the next one; gradients must not be


def _params(groups: Groups) -> list[Tensor]:
    return list(chain.from_iterable([group["params"] for group in groups]))


def _check_groups(groups: Groups) -> None:
    """Say which group's hyper-parameter is wrong, and how: what a look at all rows at once cannot."""
    for group in groups:
        check_group(group)


def _scalar_on(device: torch.device, lr: float | Tensor) -> Tensor:
    """Return a learning rate as float32 [] there; only a CUDA tensor on a CPU's behalf is waited for."""
    if isinstance(lr, Tensor) and lr.is_cuda:
        return lr.to(device, torch.float32).view(())
    return torch.full((), float(lr), dtype=torch.float32, device=device)
