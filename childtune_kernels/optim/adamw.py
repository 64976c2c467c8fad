"""ChildAdamW: AdamW that updates a child network, as a torch optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops, philox
from ..errors import require
from ..mask import ChildMask
from ..names import named_parameters
from ..ops import checks
from . import checkpoint, introspection
from .config import Config
from .gradients import GradientHooks, PackedGradients, StepInBackward
from .groups import Member, ParameterNames, check_group, require_sampling
from .memory import Memory, measure
from .packing import check_shape, fitting_mask
from .step import GradientHolder, Step, Steps

_UNCLIPPED = {
    "pack_gradients": "frees gradients inside backward(): clip_grad_norm_ and a trainer's clipping see only whole "
    "tensors' gradients. Clip with ChildAdamW(max_grad_norm=...)",
    "fused_backward": "takes its steps inside backward(): clip_grad_norm_ and a trainer's clipping come too late",
}


class ChildAdamW(torch.optim.Optimizer):
    """AdamW for Child-Tuning (Xu et al., "Raise a Child in Large Language Model", EMNLP 2021).

    ``reserve_p`` below 1 gives Child-Tuning_F: at every step each gradient element is kept with that probability and
    multiplied by its inverse (Eq. 4); which ones depends only on (seed, parameter name, step, element), see `philox`.
    ``mask`` gives Child-Tuning_D: only weights in the mask are updated (Eq. 1-3); parameters that it does not name
    are trained fully. With neither, it is AdamW. Gradients are never modified.

    Differences from torch.optim.AdamW: moments are float32 whatever the weights are; the step counter is a float64
    tensor on the parameter's device, so every step can be captured in a CUDA graph and there is no ``capturable``;
    no amsgrad, no ``differentiable``.

    Args:
        params: as in torch.optim; pass ``model.named_parameters()``, because names identify mask streams and masks.
            What torch.compile, DistributedDataParallel and checkpointing put into names is taken off them.
        lr: learning rate, float or one-element tensor. A CUDA tensor is read by the kernels, and so stays live in a
            CUDA graph.
        betas: decay of the first and second moment, in [0, 1).
        eps: added to the denominator, at least 0.
        weight_decay: decoupled, at least 0.
        reserve_p: share of gradient elements kept by F, in [2**-32, 1], per group.
        mask: the child network of D; with ``reserve_p`` below 1, F samples inside it.
        seed: of F's mask stream, in [0, 2**64), per group; restored by ``load_state_dict``.
        maximize: ascend instead of descend, per group.
        dialect: "torch": Algorithm 1 with decay before the update and eps after bias correction; "hf": what the
            released code runs: eps before bias correction, decay after the update.
        decay: in D, "child": weights outside the child never change; "all": they decay, as in the released code.
        state: "packed" (default with a mask and decay="child"): moments of the child alone, 1-D, in the order of the
            mask's bits; F's sampling inside the child needs it. "dense": moments like their parameters.
        state_dtype: of the moments: float32, bfloat16 or float16.
        low_precision: how bfloat16 and float16 weights are kept, so that small updates are not lost. "master": an
            fp32 copy, in packed state of the child alone (the default there). "kahan": what rounding left over, in
            the weights' dtype. "stochastic": rounding up or down at random, right on average, by the mask stream's
            domain 1 (the default of F; no memory). "nearest": like torch (the default otherwise). A weight that its
            copy no longer rounds to has been replaced since, as by ``load_state_dict``: then the weight counts.
        max_grad_norm: clip by the global norm of all gradients, before the mask, inside the step; None: do not;
            infinity: do not, and neither does anybody else.
        pack_gradients: in packed state, keep the child's entries of a gradient as soon as backward has it and free
            ``p.grad``: full gradients exist one tensor at a time. A step uses them up. Clipping takes the child's
            norm, and clipping from outside sees nothing of them, which a warning says.
        fused_backward: take each parameter's step inside backward and free its gradient. Learning-rate schedules
            work; ``step()`` must still follow each backward pass and ``zero_grad()`` does nothing. Nothing can clip.
        impl: "auto", or "triton", "csrc", "reference", which is then never replaced by another.

    Raises:
        ValueError, TypeError: an argument out of range, with what was expected and what came.
        RuntimeError: ``impl`` is not available, with the reason.

    Source:
        Algorithm 1 of the paper; ``state[p]`` holds torch.optim.AdamW's ``step, exp_avg, exp_avg_sq``.
    """

    _rule = ops.ADAMW
    _constructing = False

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        reserve_p: float = 1.0,
        mask: ChildMask | None = None,
        seed: int = 0,
        maximize: bool = False,
        dialect: str = "torch",
        decay: str = "child",
        state: str | None = None,
        state_dtype: torch.dtype = torch.float32,
        low_precision: str | None = None,
        max_grad_norm: float | None = None,
        pack_gradients: bool = False,
        fused_backward: bool = False,
        impl: str = "auto",
    ):
        self.config = Config(
            mask=mask,
            dialect=dialect,
            decay=decay,
            state=state,
            state_dtype=state_dtype,
            low_precision=low_precision,
            max_grad_norm=max_grad_norm,
            pack_gradients=pack_gradients,
            fused_backward=fused_backward,
            impl=impl,
            rule=self._rule,
        )
        self.names = ParameterNames()
        self.hooks: GradientHooks | None = None
        self._steps = Steps()
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            reserve_p=reserve_p,
            maximize=maximize,
            seed=seed,
            mask_stream=philox.STREAM_VERSION,
        )
        self._constructing = True
        super().__init__(self.names.unwrap(params), defaults)
        self._constructing = False
        for device_type in {member.param.device.type for member in self.members()}:
            ops.implementation(impl, device_type)
        if mask is not None:
            self.config = replace(self.config, mask=self._fitting(mask))
        self._warn_of_clipping()
        self._add_hooks()

    def _warn_of_clipping(self) -> None:
        for option, why in _UNCLIPPED.items():
            if getattr(self.config, option) and self.config.max_grad_norm is None:
                end = "max_grad_norm=math.inf says that nothing clips, and ends this warning"
                warnings.warn(f"{option}=True {why}; {end}", stacklevel=3)

    def _fitting(self, mask: ChildMask) -> ChildMask:
        return fitting_mask(mask, {member.name: member.param for member in self.members()})

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler leaves unscaling and the overflow decision to step().

        Trainers that clip gradients refuse an optimizer that says so: it does where clipping is settled here, and
        where gradients are out of reach.
        """
        return self.config.max_grad_norm is not None or self.config.pack_gradients or self.config.fused_backward

    # ---- what a caller can ask --------------------------------------------------------------------------------------

    @property
    def mask(self) -> ChildMask | None:
        """The child network of D; on the CPU in packed state, whose indices are all that a step reads."""
        return self.config.mask

    @property
    def low_precision(self) -> str:
        """How 16-bit weights are kept: "master", "kahan", "stochastic" or "nearest"."""
        return self.config.rounding(self.param_groups)

    @property
    def impl(self) -> str:
        """The implementation that serves this optimizer's parameters, e.g. "triton", or "csrc (cpu), triton (cuda)"."""
        devices = sorted({member.param.device.type for member in self.members()})
        chosen = {device: ops.implementation(self.config.impl, device).NAME for device in devices}
        names = set(chosen.values())
        return names.pop() if len(names) == 1 else ", ".join(f"{name} ({device})" for device, name in chosen.items())

    def mask_at(self, step: int, name: str) -> Tensor:
        """Regenerate the gradient mask of one parameter at one step: bool, parameter-shaped, on its device.

        Args:
            step: the parameter's step count, the first step being 1.
            name: the parameter's name, or its decimal position where the optimizer was given no names.

        Raises:
            KeyError: no parameter has that name.
            ValueError: ``step`` is not a positive integer.
        """
        return introspection.mask_at(self.mask, self.members(), step, name)

    def describe(self) -> str:
        """Return a table: per group, how many weights are trained and which share of the gradient reaches them."""
        return introspection.describe(self.config, self.param_groups, self.members(), self.impl)

    def memory(self) -> Memory:
        """Return the bytes that weights, gradients and state take now, by kind; `optim.predict` says it beforehand."""
        params = [member.param for member in self.members()]
        holders = {id(holder): holder for holder in (*params, *map(self._holder, params))}
        gradients = [holder.grad for holder in holders.values()]
        if isinstance(self.hooks, PackedGradients):
            gradients += [grad for _, grad in self.hooks.waiting]
        return measure(self.config, params, gradients, self.state)

    # ---- the step ---------------------------------------------------------------------------------------------------

    @torch._disable_dynamo  # one opaque launch: nothing in here for a compiler to fuse
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None):
        """Update every parameter that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss; run first, with gradients enabled.

        Raises:
            RuntimeError: a gradient is sparse, or of another dtype, device or shape than its parameter. Nothing has
                been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.hooks is not None:
            self._refuse_scaler()
            self.hooks.finish()
        if self.config.fused_backward:
            return loss
        overflow = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        self._steps.take(self.param_groups, self.state, self._new_step, *overflow)
        if self.config.pack_gradients:
            self.hooks.zero(set_to_none=True)
        return loss

    def _step_in_backward(self, param: Tensor, is_first: bool) -> None:
        """Take one parameter's step; ``is_first`` of those since `step`, between which groups may have changed."""
        self._steps.take_alone(param, is_first, self.param_groups, self.state, self._new_step)

    def _new_step(self, params: list[Tensor]) -> Step:
        if self.config.needs_names(self.param_groups):
            self.names.require_in_place(self.param_groups)
        wanted = set(params)
        members = [member for member in self.members() if member.param in wanted]
        return Step(self.config, members, self.param_groups, self.state, self._holder)

    def _holder(self, param: Tensor) -> GradientHolder:
        return self.hooks.holder(param) if isinstance(self.hooks, PackedGradients) else param

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, packed ones too, as in torch.optim."""
        super().zero_grad(set_to_none)
        if self.config.pack_gradients:
            self.hooks.zero(set_to_none)

    def _add_hooks(self) -> None:
        if self.hooks is not None:
            self.hooks.add(self.members())
        elif self.config.pack_gradients:
            self.hooks = PackedGradients(self.config, self.members())
        elif self.config.fused_backward:
            self.hooks = StepInBackward(self.members(), self._step_in_backward)

    def _refuse_scaler(self) -> None:
        if getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None:
            raise RuntimeError(
                "GradScaler looks for overflow in p.grad, which pack_gradients and fused_backward have freed by then: "
                "train in bfloat16 without a scaler, or without these options"
            )

    def members(self) -> list[Member]:
        """Return all parameters with their canonical names and groups, in order."""
        return self.names.members(self.param_groups)

    # ---- groups and state -------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in torch.optim. Nothing is added if anything in it is refused."""
        self._check_group({**self.defaults, **param_group})
        params = param_group["params"]
        if isinstance(params, (set, frozenset)):
            raise TypeError("params must be in order, because positions name parameters, got a set")
        group = {**param_group, "params": [params] if isinstance(params, Tensor) else list(params)}
        group = group if self._constructing else self.names.add(group)
        entries = [entry if isinstance(entry, tuple) else (None, entry) for entry in group["params"]]
        position = sum(len(g["params"]) for g in self.param_groups)
        taken = {member.name for member in self.members()}
        for offset, (name, param) in enumerate(entries):
            name = str(position + offset) if name is None else name
            if isinstance(param, Tensor):  # anything else is refused by torch, below
                checks.check_parameter(f"params: {name!r}", param)
                if not self._constructing and self.mask is not None and name in self.mask:
                    check_shape(self.mask, name, param)
            require("params", name, name not in taken, "a name not used before")
            taken.add(name)
        require("params", "a repeated tensor", len({id(p) for _, p in entries}) == len(entries), "distinct tensors")
        super().add_param_group(group)
        self.names.settle(self.param_groups)
        self._steps = Steps()
        if self.hooks is not None:
            self._add_hooks()

    def _check_group(self, group: dict[str, Any]) -> None:
        check_group(group)
        require_sampling(group, self.mask is None or self.config.packing is not None)

    def state_dict(self) -> dict[str, Any]:
        """Return groups and state, as torch.optim; entries of masked parameters say which child they belong to."""
        self.names.settle(self.param_groups)

        def tag(_, state_dict: dict[str, Any]) -> dict[str, Any]:
            return checkpoint.tag_child(state_dict, self.config, self.members())

        hook = self.register_state_dict_post_hook(tag, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def dense_state_dict(self) -> dict[str, Any]:
        """Return the state as torch.optim.AdamW loads it: moments like their parameters, zero outside the child."""
        return checkpoint.without_child(self.state_dict(), self.members())

    @torch.no_grad()
    def set_mask(self, mask: ChildMask | None) -> None:
        """Change the child network between steps; ``state`` becomes "packed" for one, or "dense" for None.

        Weights that leave the child stay where they are. Moments of weights that stay in it are kept, those of new
        ones start at zero. The step count is a parameter's, so bias correction does not start again: the first
        update of a new weight is up to (1 - beta1) / sqrt(1 - beta2) times lr, 3.2 lr by default.

        Raises:
            ValueError: as for the constructor's ``mask``; nothing has been changed then.
        """
        config = self.config
        if mask is not None:
            require("mask", mask, isinstance(mask, ChildMask), "a ChildMask or None")
            mask = self._fitting(mask)
            require("decay", config.decay, config.decay == "child", "'child' where the mask changes")
        fits = mask is not None or not config.pack_gradients
        require("mask", mask, fits, "a ChildMask where gradients are packed")
        if isinstance(self.hooks, PackedGradients):
            self.hooks.pack()
            pending = any(hook.grad is not None for hook in self.hooks.hooks.values())
            require("set_mask", "packed gradients", not pending, "called after step() and zero_grad()")
        new = replace(config, mask=mask, state=None)
        self._put(checkpoint.moved_state(self.members(), self.state, config, new), new)

    def _put(self, state: dict[Tensor, dict], config: Config) -> None:
        """Take state as another configuration, of another child, keeps it."""
        changed = config is not self.config
        self.state.update(state)
        self.config = config
        self._steps = Steps()
        if changed and self.hooks is not None:
            self.hooks.remove()
            self.hooks = None
            self._add_hooks()

    def assert_frozen(self, reference: nn.Module | Mapping[str, Tensor]) -> None:
        """Prove that weights outside the child have never changed.

        Args:
            reference: the pretrained model or its state dict.

        Raises:
            AssertionError: a weight outside the child differs from the reference in any bit; says how many, where.
            ValueError: there is no mask, or the reference lacks a parameter or has it of another shape or dtype.
        """
        require("mask", None, self.mask is not None, "a ChildMask: without one every weight is trained")
        if isinstance(reference, nn.Module):
            reference = named_parameters(reference, remove_duplicate=False)
        if found := introspection.changed_outside_child(self.mask, self.members(), reference):
            raise AssertionError(f"weights outside the child must equal the reference, but these many differ: {found}")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state of this optimizer or of torch.optim.AdamW; groups and seeds come from the state.

        Moments are converted to ``state_dtype`` and otherwise arrive unchanged (torch would cast them to the dtype
        of the weights). An optimizer without a mask takes on the child that the state belongs to, with a warning.
        Nothing is changed if anything in the state is refused.

        Raises:
            ValueError: other group sizes, parameter names, moment shapes or mask-stream version; a step count out of
                [0, 2**32); amsgrad state; a child that this optimizer's options have no room for.
        """
        kept: dict[str, Any] = {}

        def take_state(_, loaded):  # runs after users' pre-hooks; torch then has no tensors left to cast
            config, groups, members = self.config, self.param_groups, self.members()
            if (mask := checkpoint.adopted_mask(config, groups, members, loaded)) is not None:
                config = replace(config, mask=mask)
            kept["state"] = checkpoint.read_state(config, groups, members, loaded)
            kept["config"] = config
            return {**loaded, "state": {}, "param_groups": checkpoint.merged_groups(groups, loaded)}

        def put_state(_):  # runs before users' post-hooks
            self.names.known.clear()
            self.names.settle(self.param_groups)
            self._put(**kept)

        hooks = (
            self.register_load_state_dict_pre_hook(take_state),
            self.register_load_state_dict_post_hook(put_state, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._steps = Steps()
        self._add_hooks()

    def __getstate__(self) -> dict[str, Any]:  # torch's keeps defaults, state and groups only
        return {**super().__getstate__(), "config": self.config, "names": self.names, "hooks": None}
