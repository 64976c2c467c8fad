"""ChildAdamW: AdamW that updates a child network, as a torch optimizer."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from . import ops, philox
from .mask import ChildMask
from .ops import checks
from .ops.checks import require
from .plan import MOMENTS, Plan, check_group


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
        mask: the child network of D.
        seed: of F's mask stream, in [0, 2**64), per group; restored by ``load_state_dict``.
        maximize: ascend instead of descend, per group.
        dialect: "torch": Algorithm 1 with decay before the update and eps after bias correction; "hf": what the
            released code runs: eps before bias correction, decay after the update.
        decay: in D, "child": weights outside the child never change; "all": they decay, as in the released code.
        state_dtype: of the moments: float32, bfloat16 or float16.
        max_grad_norm: clip by the global norm of all gradients, before the mask, inside the step; None: do not.
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
        state_dtype: torch.dtype = torch.float32,
        max_grad_norm: float | None = None,
        impl: str = "auto",
    ):
        require("dialect", dialect, dialect in ("torch", "hf"), "'torch' or 'hf'")
        require("decay", decay, decay in ("child", "all"), "'child' or 'all'")
        require("state_dtype", state_dtype, state_dtype in checks.WEIGHT_DTYPES, "float32, bfloat16 or float16")
        require("mask", mask, mask is None or isinstance(mask, ChildMask), "a ChildMask or None")
        require("max_grad_norm", max_grad_norm, max_grad_norm is None or max_grad_norm > 0, "above 0 or None")
        require("impl", impl, impl in ("auto", *ops.IMPLEMENTATIONS), f"one of {('auto', *ops.IMPLEMENTATIONS)}")
        self.mask = mask
        self.dialect = dialect
        self.decay = decay
        self.state_dtype = state_dtype
        self.max_grad_norm = max_grad_norm
        self.requested_impl = impl
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
        unknown = [] if mask is None else sorted(set(mask) - {name for _, name, _ in self.named()})
        require("mask", unknown, not unknown, "a mask that names only this optimizer's parameters")

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
        require("step", step, isinstance(step, int) and step >= 1, "an integer of at least 1")
        found = [(param, group) for param, own_name, group in self.named() if own_name == name]
        if not found:
            raise KeyError(f"name must be one of the optimizer's parameter names, got {name!r}")
        param, group = found[0]
        if self.mask is not None and name in self.mask:
            return self.mask.to_dense(name).to(param.device)
        if group["reserve_p"] == 1:
            return torch.ones(param.shape, dtype=torch.bool, device=param.device)
        key = philox.stream_key(group["seed"], name)
        words = ops.bernoulli_bits(
            param.numel(), key, step, group["reserve_p"], philox.GRADIENT_MASK, 0, device=param.device
        )
        return ops.unpack_bits(words, param.numel()).view(param.shape)

    def describe(self) -> str:
        """Return a table: per group, how many weights there are and which share of the gradient reaches them."""
        lines = [f"{'group':>5} {'tensors':>8} {'weights':>14} {'in child':>14} {'share':>7}  rule"]
        for index, group in enumerate(self.param_groups):
            own = [(p, name) for p, name, g in self.named() if g is group]
            weights = sum(p.numel() for p, _ in own)
            masked = [name for _, name in own if self.mask is not None and name in self.mask]
            child = weights
            for name in masked:
                child += self.mask.count(name) - self.mask.shape(name).numel()
            rule = "every weight"
            if masked:
                rule = f"D: {len(masked)} tensors masked, decay={self.decay!r}"
            elif group["reserve_p"] < 1:
                rule = f"F: a fresh {group['reserve_p']:g} of the gradient each step, seed {group['seed']}"
            share = child / weights if weights else 0.0
            lines.append(f"{index:>5} {len(own):>8} {weights:>14,} {child:>14,} {share:>7.2%}  {rule}")
        return "\n".join([*lines, f"{self.dialect} dialect, moments {self.state_dtype}, implementation: {self.impl}"])

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
        params = list(chain.from_iterable([group["params"] for group in self.param_groups]))
        if self._plan is None or not self._plan.serves(self, params):
            self._plan = Plan(self, params)
        self._plan.run(self)
        return loss

    def named(self) -> list[tuple[Tensor, str, dict]]:
        """Return (parameter, name, group) of all parameters, in order."""
        rows = [(p, group, i) for group in self.param_groups for i, p in enumerate(group["params"])]
        return [
            (p, group["param_names"][i] if "param_names" in group else str(position), group)
            for position, (p, group, i) in enumerate(rows)
        ]

    def init_state(self, params: list[Tensor]) -> None:
        if any(p.is_cuda for p in params) and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("optimizer state must exist before a CUDA graph is captured: run one step first")
        for p in params:
            self.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                **{key: torch.zeros(p.shape, dtype=self.state_dtype, device=p.device) for key in MOMENTS},
            }

    # ---- groups and state -------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in torch.optim. Nothing is added if anything in it is refused."""
        self._check_group({**self.defaults, **param_group})
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
                if self.mask is not None and name in self.mask and self.mask.shape(name) != param.shape:
                    expected, got = tuple(param.shape), tuple(self.mask.shape(name))
                    raise ValueError(f"mask of {name!r} must have shape {expected}, got {got}")
            require("params", name, name not in taken, "a name not used before")
            taken.add(name)
        require("params", "a repeated tensor", len({id(p) for _, p in entries}) == len(entries), "distinct tensors")
        super().add_param_group(group)
        self._plan = None

    def _check_group(self, group: dict[str, Any]) -> None:
        check_group(group)
        p = group["reserve_p"]
        require("reserve_p", p, self.mask is None or p == 1, "1 where a mask is given: F or D, not both")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state of this optimizer or of torch.optim.AdamW; groups and seeds come from the state.

        Moments are converted to ``state_dtype`` and otherwise arrive unchanged (torch would cast them to the dtype
        of the weights). Nothing is changed if anything in the state is refused.

        Raises:
            ValueError: other group sizes, parameter names, moment shapes or mask-stream version; amsgrad state.
        """
        kept: dict[Tensor, dict] = {}

        def take_state(_, loaded):  # runs after users' pre-hooks; torch then has no tensors left to cast
            kept.update(self._read_state(loaded))
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

    def _read_state(self, loaded: dict[str, Any]) -> dict[Tensor, dict]:
        """Check a state dict against this optimizer and return its entries, copied, by parameter."""
        sizes = [len(g["params"]) for g in loaded["param_groups"]]
        expected = [len(g["params"]) for g in self.param_groups]
        require("state_dict", f"groups of {sizes}", sizes == expected, f"parameter groups of {expected} parameters")
        state = {}
        for own, saved in zip(self.param_groups, loaded["param_groups"], strict=True):
            version = saved.get("mask_stream", philox.STREAM_VERSION)
            require(
                "state_dict",
                f"version {version}",
                version == philox.STREAM_VERSION,
                f"mask stream version {philox.STREAM_VERSION}",
            )
            require("state_dict", "amsgrad state", not saved.get("amsgrad"), "state without amsgrad")
            names, saved_names = own.get("param_names"), saved.get("param_names")
            same = saved_names is None or names == saved_names or (names is None and self.mask is None)
            by_position = "parameters without names: this optimizer's mask knows them by position"
            require("state_dict", saved_names, same, f"parameters named {names}" if names else by_position)
            self._check_group({**{k: v for k, v in own.items() if k != "params"}, **saved})
            for param, index in zip(own["params"], saved["params"], strict=True):
                if entry := loaded["state"].get(index):
                    state[param] = self._read_entry(param, index, entry)
        return state

    def _read_entry(self, param: Tensor, index: int, entry: dict[str, Any]) -> dict[str, Any]:
        complete = entry.keys() >= {"step", *MOMENTS}
        require(f"state_dict: state of parameter {index}", sorted(entry), complete, "AdamW's step, exp_avg, exp_avg_sq")
        for key in MOMENTS:
            got = tuple(entry[key].shape)
            require(
                f"state_dict: {key} of parameter {index}", got, got == tuple(param.shape), f"shape {tuple(param.shape)}"
            )
        restored = {
            "step": torch.as_tensor(entry["step"]).to(param.device, torch.float32, copy=True).view(()),
            **{
                key: entry[key].to(param.device, self.state_dtype, copy=True, memory_format=torch.contiguous_format)
                for key in MOMENTS
            },
        }
        return {**entry, **restored}

    def __getstate__(self) -> dict[str, Any]:  # torch's keeps defaults, state and groups only
        own = ("mask", "dialect", "decay", "state_dtype", "max_grad_norm", "requested_impl")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}, "_plan": None}
