"""ChildAdamW: AdamW that updates a child network, as a torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from . import audit, ops, philox
from .child import Packing, check_mask, check_shape
from .exchange import add_children, moved_state, read_state, without_children
from .hooks import GradientHooks, PackedGradients, StepInBackward
from .mask import ChildMask
from .memory import Memory, measure
from .ops import checks
from .ops.checks import require
from .plan import SAMPLED_CHILD, Plan, check_group
from .state import LOW_PRECISION, StateLayout

_OWN = ("mask", "layout", "dialect", "decay", "state_dtype", "max_grad_norm", "requested_impl")
_OWN += ("pack_gradients", "fused_backward")


class ChildAdamW(torch.optim.Optimizer):
    """AdamW for Child-Tuning (Xu et al., "Raise a Child in Large Language Model", EMNLP 2021).

    ``reserve_p`` below 1 gives Child-Tuning_F: at every step each gradient element is kept with that probability and
    multiplied by its inverse (Eq. 4); which ones depends only on (seed, parameter name, step, element), see `philox`.
    ``mask`` gives Child-Tuning_D: only weights in the mask are updated (Eq. 1-3); parameters that it does not name
    are trained fully. With neither, it is AdamW. Gradients are never modified.

    Differences from torch.optim.AdamW: moments are float32 whatever the weights are; the step counter is a float32
    tensor on the parameter's device, so every step can be captured in a CUDA graph and there is no ``capturable``;
    no amsgrad, no ``differentiable``.

    Args:
        params: as in torch.optim; pass ``model.named_parameters()``, because names identify mask streams and masks.
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
            domain 1 (the default of F; no memory). "nearest": like torch (the default otherwise).
        max_grad_norm: clip by the global norm of all gradients, before the mask, inside the step; None: do not.
        pack_gradients: in packed state, keep the child's entries of a gradient as soon as backward has it and free
            ``p.grad``: full gradients exist one tensor at a time. Clipping then takes the child's norm.
        fused_backward: take each parameter's step inside backward and free its gradient. Learning-rate schedules
            work; ``step()`` must still follow each backward pass and ``zero_grad()`` does nothing.
        impl: "auto", or "triton", "csrc", "reference", which is then never replaced by another.

    Raises:
        ValueError, TypeError: an argument out of range, with what was expected and what came.
        RuntimeError: ``impl`` is not available, with the reason.

    Source:
        Algorithm 1 of the paper; ``state[p]`` holds torch.optim.AdamW's ``step, exp_avg, exp_avg_sq``.
    """

    _step_supports_amp_scaling = True  # GradScaler leaves unscaling and the overflow decision to step()

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
        require("dialect", dialect, dialect in ("torch", "hf"), "'torch' or 'hf'")
        require("decay", decay, decay in ("child", "all"), "'child' or 'all'")
        require("state_dtype", state_dtype, state_dtype in checks.WEIGHT_DTYPES, "float32, bfloat16 or float16")
        require("mask", mask, mask is None or isinstance(mask, ChildMask), "a ChildMask or None")
        require("max_grad_norm", max_grad_norm, max_grad_norm is None or max_grad_norm > 0, "above 0 or None")
        require("impl", impl, impl in ("auto", *ops.IMPLEMENTATIONS), f"one of {('auto', *ops.IMPLEMENTATIONS)}")
        state = state or ("packed" if mask is not None and decay == "child" else "dense")
        require("state", state, state in ("packed", "dense"), "'packed' or 'dense'")
        outside_decays = f"'dense' where decay={decay!r} or there is no mask: packed state is the child's alone"
        require("state", state, state == "dense" or (mask is not None and decay == "child"), outside_decays)
        packing = Packing(mask) if state == "packed" else None
        self.layout = StateLayout(packing, state_dtype, "nearest")
        self.mask = mask if packing is None else packing.mask
        self.dialect = dialect
        self.decay = decay
        self.state_dtype = state_dtype
        self.max_grad_norm = max_grad_norm
        self.requested_impl = impl
        packed = not pack_gradients or self.packing is not None
        require("pack_gradients", pack_gradients, packed, "False where the state is not packed")
        alone = not fused_backward or (not pack_gradients and max_grad_norm is None)
        require("fused_backward", fused_backward, alone, "False where pack_gradients or max_grad_norm is given")
        self.pack_gradients, self.fused_backward = pack_gradients, fused_backward
        self.hooks: GradientHooks | None = None
        self._plan: Plan | None = None
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
        super().__init__(params, defaults)
        for device_type in {p.device.type for p, _, _ in self.named()}:
            ops.implementation(impl, device_type)
        if mask is not None:
            check_mask(mask, {name: param for param, name, _ in self.named()})
        self.layout.low_precision = self._choose(low_precision)
        self._add_hooks()

    def _choose(self, low_precision: str | None) -> str:
        """Return how 16-bit weights are kept."""
        random = any(group["reserve_p"] < 1 for group in self.param_groups)
        default = "nearest" if self.mask is not None or not random else "stochastic"
        chosen = low_precision or ("master" if self.packing is not None else default)
        require("low_precision", chosen, chosen in LOW_PRECISION, f"one of {LOW_PRECISION}")
        dense_child = self.mask is not None and self.packing is None
        require("low_precision", chosen, chosen == "nearest" or not dense_child, "'nearest' where state='dense'")
        return chosen

    @property
    def packing(self) -> Packing | None:
        """Where the child lies in packed state; None in dense state."""
        return self.layout.packing

    @property
    def low_precision(self) -> str:
        """How 16-bit weights are kept: "master", "kahan", "stochastic" or "nearest"."""
        return self.layout.low_precision

    # ---- what a caller can ask --------------------------------------------------------------------------------------

    @property
    def impl(self) -> str:
        """The implementation that serves this optimizer's parameters, e.g. "triton", or "csrc (cpu), triton (cuda)"."""
        chosen = {
            d: ops.implementation(self.requested_impl, d).name
            for d in sorted({p.device.type for p, _, _ in self.named()})
        }
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
        return audit.mask_at(self, step, name)

    def describe(self) -> str:
        """Return a table: per group, how many weights there are and which share of the gradient reaches them."""
        return audit.describe(self)

    def memory(self) -> Memory:
        """Return the bytes that weights, gradients and state take now, by kind; `memory.predict` says it beforehand."""
        return measure(self)

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
            self.hooks.refuse_gradients()
            self.hooks.pack()
        if self.fused_backward:
            self.hooks.stepped.clear()
            return loss
        params = list(chain.from_iterable([group["params"] for group in self.param_groups]))
        if self._plan is None or not self._plan.serves(self, params):
            self._plan = Plan(self, params)
        self._plan.run(self)
        return loss

    def gradient_holder(self, param: Tensor):
        """Return what has a parameter's gradient as ``grad``: itself, or its hook where gradients are packed."""
        return self.hooks.holder(param) if self.pack_gradients else param

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, packed ones too, as in torch.optim."""
        super().zero_grad(set_to_none)
        if self.pack_gradients:
            self.hooks.zero(set_to_none)

    def _add_hooks(self) -> None:
        if self.hooks is not None:
            self.hooks.add(self.named())
        elif self.pack_gradients or self.fused_backward:
            self.hooks = (PackedGradients if self.pack_gradients else StepInBackward)(self)

    def _refuse_scaler(self) -> None:
        if getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None:
            raise RuntimeError(
                "GradScaler looks for overflow in p.grad, which pack_gradients and fused_backward have freed by then: "
                "train in bfloat16 without a scaler, or without these options"
            )

    def named(self) -> list[tuple[Tensor, str, dict]]:
        """Return (parameter, name, group) of all parameters, in order."""
        rows = [(p, group, i) for group in self.param_groups for i, p in enumerate(group["params"])]
        return [
            (p, group["param_names"][i] if "param_names" in group else str(position), group)
            for position, (p, group, i) in enumerate(rows)
        ]

    def init_state(self, named: list[tuple[Tensor, str]]) -> None:
        """Give parameters the state that they lack, all of it or nothing."""
        fresh = {}
        for param, name in named:
            entry = self.state.get(param)
            if not entry:
                fresh[param] = self.layout.new(name, param)
            elif (whole := self.layout.accompanied(name, param, entry)).keys() != entry.keys():
                fresh[param] = whole  # the weights were cast after the last step
        if any(p.is_cuda for p in fresh) and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("optimizer state must exist before a CUDA graph is captured: run one step first")
        for param, entry in fresh.items():
            self.state[param] = entry

    # ---- groups and state -------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in torch.optim. Nothing is added if anything in it is refused."""
        self.check_group({**self.defaults, **param_group})
        params = param_group["params"]
        if isinstance(params, set):
            raise TypeError("params must be in order, because positions name parameters, got a set")
        group = {**param_group, "params": [params] if isinstance(params, Tensor) else list(params)}
        entries = [entry if isinstance(entry, tuple) else (None, entry) for entry in group["params"]]
        position = sum(len(g["params"]) for g in self.param_groups)
        taken = {name for _, name, _ in self.named()}
        for offset, (name, param) in enumerate(entries):
            name = str(position + offset) if name is None else name
            if isinstance(param, Tensor):  # anything else is refused by torch, below
                checks.check_parameter(f"params: {name!r}", param)
                if self.mask is not None and name in self.mask:
                    check_shape(self.mask, name, param)
            require("params", name, name not in taken, "a name not used before")
            taken.add(name)
        require("params", "a repeated tensor", len({id(p) for _, p in entries}) == len(entries), "distinct tensors")
        super().add_param_group(group)
        self._plan = None
        if getattr(self, "hooks", None) is not None:
            self._add_hooks()

    def check_group(self, group: dict[str, Any]) -> None:
        check_group(group)
        p = group["reserve_p"]
        require("reserve_p", p, p == 1 or self.mask is None or self.packing is not None, SAMPLED_CHILD)

    def state_dict(self) -> dict[str, Any]:
        """Return groups and state, as torch.optim; entries of masked parameters say which child they belong to."""
        hook = self.register_state_dict_post_hook(add_children, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def dense_state_dict(self) -> dict[str, Any]:
        """Return the state as torch.optim.AdamW loads it: moments like their parameters, zero outside the child."""
        return without_children(self, self.state_dict())

    @torch.no_grad()
    def set_mask(self, mask: ChildMask | None) -> None:
        """Change the child network between steps; ``state`` becomes "packed" for one, or "dense" for None.

        Weights that leave the child stay where they are. Moments of weights that stay in it are kept, those of new
        ones start at zero. The step count is a parameter's, so bias correction does not start again: the first
        update of a new weight is up to (1 - beta1) / sqrt(1 - beta2) times lr, 3.2 lr by default.

        Raises:
            ValueError: as for the constructor's ``mask``; nothing has been changed then.
        """
        packing = None
        if mask is not None:
            check_mask(mask, {name: param for param, name, _ in self.named()})
            require("decay", self.decay, self.decay == "child", "'child' where the mask changes")
            packing = Packing(mask)
        require("mask", mask, mask is not None or not self.pack_gradients, "a ChildMask where gradients are packed")
        if self.pack_gradients:
            self.hooks.pack()
            pending = any(hook.grad is not None for hook in self.hooks.hooks.values())
            require("set_mask", "packed gradients", not pending, "called after step() and zero_grad()")
        layout = StateLayout(packing, self.state_dtype, self.low_precision)
        self.state.update(moved_state(self, layout))
        self.layout, self.mask, self._plan = layout, None if packing is None else packing.mask, None
        if self.hooks is not None:
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
            reference = dict(reference.named_parameters(remove_duplicate=False))
        if found := audit.thawed(self, reference):
            raise AssertionError(f"weights outside the child must equal the reference, but these many differ: {found}")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state of this optimizer or of torch.optim.AdamW; groups and seeds come from the state.

        Moments are converted to ``state_dtype`` and otherwise arrive unchanged (torch would cast them to the dtype
        of the weights). Nothing is changed if anything in the state is refused.

        Raises:
            ValueError: other group sizes, parameter names, moment shapes or mask-stream version; amsgrad state.
        """
        kept: dict[Tensor, dict] = {}

        def take_state(_, loaded):  # runs after users' pre-hooks; torch then has no tensors left to cast
            kept.update(read_state(self, loaded))
            defaults = [{k: v for k, v in g.items() if k != "params"} for g in self.param_groups]
            groups = [{**own, **saved} for own, saved in zip(defaults, loaded["param_groups"], strict=True)]
            return {**loaded, "state": {}, "param_groups": groups}

        def put_state(_):  # runs before users' post-hooks
            self.state.update(kept)
            self._plan = None

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
        self._add_hooks()

    def __getstate__(self) -> dict[str, Any]:  # torch's keeps defaults, state and groups only
        own = {name: getattr(self, name) for name in _OWN}
        return {**super().__getstate__(), **own, "hooks": None, "_plan": None}
