"""What happens to a gradient the moment backward has accumulated it: it is packed, or its whole step is taken.

Full gradients then exist one tensor at a time: ``p.grad`` is freed inside backward.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from .. import ops
from ..errors import require
from ..names import listed
from ..ops import checks
from .config import Config
from .groups import Member
from .packing import check_shape

TOGETHER = 128 << 20  # bytes of gradients that are packed in one launch


class _Hook:
    """A post-accumulate-grad hook of one parameter, known by its class, so that a second one can be refused.

    ``grad`` stands in for the parameter's own where a step looks for it. What a call needs is held here: in a small
    model the hooks' host time is what packing costs.
    """

    def __init__(self, owner: GradientHooks, param: Tensor, name: str):
        self.owner = weakref.ref(owner)
        self.name = name
        self.shape: torch.Size | None = None  # that the indices for its gradient were made for
        self.nbytes = param.nbytes
        self.waits = False
        self.grad: Tensor | None = None

    def __call__(self, param: Tensor) -> None:
        owner = self.owner()
        if owner is not None:
            owner.receive(self, param)


class GradientHooks:
    """Hooks of one optimizer on those parameters whose gradients it does not leave alone.

    Raises:
        ValueError: a parameter has such a hook already, of another optimizer that is still alive.
        RuntimeError: several ranks train together: a hook would see gradients before they are averaged.
    """

    def __init__(self, members: Iterable[Member]):
        _refuse_ranks()
        self.hooks: dict[Tensor, _Hook] = {}
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        weakref.finalize(self, _remove, self.handles)
        self.add(members)

    def add(self, members: Iterable[Member]) -> None:
        """Hook the parameters that have no hook yet."""
        fresh = {p: name for p, name, _ in members if p not in self.hooks and self.wants(p, name)}
        for param, name in fresh.items():
            hooks = (getattr(param, "_post_accumulate_grad_hooks", None) or {}).values()
            taken = any(isinstance(hook, _Hook) and hook.owner() is not None for hook in hooks)
            require(f"parameter {name!r}", "one with such a hook", not taken, "without another optimizer's hook")
        for param in fresh:
            self.hooks[param] = _Hook(self, param, fresh[param])
            self.handles.append(param.register_post_accumulate_grad_hook(self.hooks[param]))

    def remove(self) -> None:
        """Take the hooks away."""
        _remove(self.handles)
        self.hooks.clear()

    def finish(self) -> None:
        """Finish what `receive` has put off, and receive what was put into p.grad by hand, as checkpoints do.

        Raises:
            RuntimeError: a parameter has such a gradient, and one from backward(); nothing has been changed then.
        """
        by_hand = [(p, hook) for p, hook in self.hooks.items() if p.grad is not None]
        if twice := [hook.name for p, hook in by_hand if self.has_received(hook, p)]:
            raise RuntimeError(
                "gradients must come from backward(), where hooks take them, or be set instead of it, but p.grad was "
                f"set: {listed(twice)}"
            )
        for param, hook in by_hand:
            self.receive(hook, param)

    def has_received(self, hook: _Hook, param: Tensor) -> bool:
        """Whether a parameter's gradient of this step has been here already."""
        raise NotImplementedError

    def wants(self, param: Tensor, name: str) -> bool:
        """Whether a parameter's gradient is to be received."""
        return param.requires_grad

    def receive(self, hook: _Hook, param: Tensor) -> None:
        """Take one parameter's gradient and free it."""
        raise NotImplementedError


class PackedGradients(GradientHooks):
    """Keeps the child's entries of each gradient, added up over several backward passes, and frees the rest.

    Gradients wait until TOGETHER bytes are together, and are packed in one launch: a launch each would take longer than
    the backward pass of a small model (H200, BERT-large, bf16, 32 x 128: 27 ms instead of 17).
    """

    def __init__(self, config: Config, members: Iterable[Member]):
        self.config = config
        self.waiting: list[tuple[_Hook, Tensor]] = []
        self.waiting_bytes = 0
        self.stream: int | None = None  # that the waiting gradients were made on
        # gradients that stay in p.grad, as backward left them, and the names of their parameters
        self.seen: dict[Tensor, tuple[int, int, Tensor] | None] = {}
        self.seen_names: dict[Tensor, str] = {}
        super().__init__(members)

    def wants(self, param: Tensor, name: str) -> bool:
        return param.requires_grad and not self.config.packing.is_whole(name)

    def add(self, members: Iterable[Member]) -> None:
        super().add(members)
        for hook in self.hooks.values():
            hook.shape = self.config.mask.shape(hook.name)
        for param, name, _ in members:
            if param.requires_grad and param not in self.hooks and param not in self.seen:
                self.seen[param], self.seen_names[param] = None, name
                self.handles.append(param.register_post_accumulate_grad_hook(partial(_see, weakref.ref(self))))

    def finish(self) -> None:
        super().finish()
        self.pack()
        self._tell_of_changes()

    def has_received(self, hook: _Hook, param: Tensor) -> bool:
        return hook.waits or hook.grad is not None

    def _tell_of_changes(self) -> None:
        """Warn where gradients in p.grad were changed after backward: whoever clips these misses the packed ones.

        A trainer that only asks for their norm multiplies them by 1: that is no change, and the device is waited for
        to know it.
        """
        changed = {p for p, seen in self.seen.items() if seen and p.grad is not None and _is_changed(p.grad, *seen)}
        self.seen = dict.fromkeys(self.seen)
        if changed:
            names = [name for p, name in self.seen_names.items() if p in changed]
            warnings.warn(
                f"gradients were changed between backward() and step(), as by clipping from outside: {listed(names)}; "
                "packed gradients were not: clip with ChildAdamW(max_grad_norm=...), and with nothing else",
                stacklevel=5,
            )

    def receive(self, hook: _Hook, param: Tensor) -> None:
        grad = param.grad
        if grad.shape != hook.shape:  # the indices reach beyond it
            check_shape(self.config.mask, hook.name, grad)
        if grad.dtype != param.dtype or grad.layout != torch.strided:
            checks.check_gradient(f"parameter {hook.name!r}", grad, param)
        # torch.cuda.current_stream takes several microseconds, as much as all else in here
        stream = torch._C._cuda_getCurrentRawStream(grad.get_device()) if grad.is_cuda else None
        if hook.waits or stream != self.stream:
            self.pack()
        self.waiting.append((hook, grad))
        self.waiting_bytes += hook.nbytes
        self.stream, hook.waits, param.grad = stream, True, None
        if self.waiting_bytes >= TOGETHER:
            self.pack()

    @torch.no_grad()
    def pack(self) -> None:
        """Pack what waits, on the stream that made it: `step` calls this too, after backward has joined its streams."""
        if not self.waiting:
            return
        _refuse_ranks()
        waiting, lists = self.waiting, {}
        self.waiting, self.waiting_bytes = [], 0
        with _on_stream(self.stream, waiting[0][1].device):
            for hook, grad in waiting:
                hook.waits = False
                alike = lists.setdefault((grad.device, grad.dtype, hook.grad is not None), ([], [], []))
                alike[0].append(hook)
                alike[1].append(grad.contiguous())
                alike[2].append(self.config.packing.indices(hook.name, grad.device))
            for (device, dtype, add), (hooks, grads, indices) in lists.items():
                if not add:
                    for hook, packed in zip(hooks, _empty(indices, dtype), strict=True):
                        hook.grad = packed
                packed = [hook.grad for hook in hooks]
                ops.implementation(self.config.impl, device.type).gather_child_(packed, grads, indices, add)

    def holder(self, param: Tensor) -> Tensor | _Hook:
        """Return what holds the parameter's gradient as ``grad``."""
        return self.hooks.get(param, param)

    def zero(self, set_to_none: bool) -> None:
        """Drop the packed gradients, or set them to zero."""
        self.pack()
        for hook in self.hooks.values():
            hook.grad = None if set_to_none or hook.grad is None else hook.grad.zero_()


class StepInBackward(GradientHooks):
    """Takes each parameter's step as soon as its gradient is there, and frees the gradient.

    Args:
        members: of the optimizer.
        take_step: a bound method of the optimizer, which is not kept alive by this: takes one parameter's step;
            ``is_first`` where it is the first since `ChildAdamW.step`.
    """

    def __init__(self, members: Iterable[Member], take_step: Callable[[Tensor, bool], None]):
        self.take_step = weakref.WeakMethod(take_step)
        self.stepped: set[Tensor] = set()  # since the last step(): a second gradient would be a second step
        super().__init__(members)

    def finish(self) -> None:
        super().finish()
        self.stepped.clear()

    def has_received(self, hook: _Hook, param: Tensor) -> bool:
        return param in self.stepped

    @torch.no_grad()
    def receive(self, hook: _Hook, param: Tensor) -> None:
        _refuse_ranks()
        if (take_step := self.take_step()) is None:
            return
        if param in self.stepped:
            raise RuntimeError(
                "fused_backward=True takes a step a backward pass, and step() must follow each; a second gradient of "
                f"shape {tuple(param.shape)} came before: accumulate gradients with pack_gradients=True instead"
            )
        take_step(param, not self.stepped)
        self.stepped.add(param)
        param.grad = None


def _see(owner: weakref.ref, param: Tensor) -> None:
    """Remember the gradient that backward has left in p.grad."""
    if (hooks := owner()) is not None:
        hooks.seen[param] = (id(param.grad), param.grad._version, _sample(param.grad))


def _is_changed(grad: Tensor, identity: int, version: int, sample: Tensor) -> bool:
    return (id(grad), grad._version) != (identity, version) and not torch.equal(_sample(grad), sample)


def _sample(grad: Tensor) -> Tensor:
    """Return a copy of some of a gradient's elements, at most 64, from all over it."""
    flat = grad.detach().reshape(-1)
    return flat[:: max(1, -(-flat.numel() // 64))].clone()


def _empty(indices: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return a tensor as long as each of the indices, 16 bytes aligned, all in one allocation: one each takes 6 us."""
    aligned = 16 // dtype.itemsize
    sizes = [size for index in indices for size in (len(index), -len(index) % aligned)]
    return torch.empty(sum(sizes), dtype=dtype, device=indices[0].device).split(sizes)[::2]


def _on_stream(raw: int | None, device: torch.device):
    if raw is None or raw == torch.cuda.current_stream(device).cuda_stream:
        return contextlib.nullcontext()
    return torch.cuda.stream(torch.cuda.ExternalStream(raw, device=device))


def _remove(handles: list) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def _refuse_ranks() -> None:
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise RuntimeError(
            f"pack_gradients and fused_backward must run on one rank, got {dist.get_world_size()}: "
            "hooks see a gradient before DistributedDataParallel has averaged it over ranks"
        )
