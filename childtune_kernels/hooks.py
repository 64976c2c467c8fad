"""What happens to a gradient the moment backward has accumulated it: it is packed, or its whole step is taken.

Full gradients then exist one tensor at a time: ``p.grad`` is freed inside backward.
"""

from __future__ import annotations

import contextlib
import weakref

import torch
from torch import Tensor

from . import ops
from .ops import checks
from .ops.checks import require
from .plan import Plan

TOGETHER = 128 << 20  # bytes of gradients that are packed in one launch


class _Hook:
    """A post-accumulate-grad hook of one parameter, known by its class, so that a second one can be refused.

    ``grad`` stands in for the parameter's own where a step looks for it. What a call needs is held here: in a small
    model the hooks' host time is what packing costs.
    """

    def __init__(self, owner: GradientHooks, param: Tensor, name: str):
        self.owner = weakref.ref(owner)
        self.name = name
        self.nbytes = param.nbytes
        self.waits = False
        self.grad: Tensor | None = None

    def __call__(self, param: Tensor) -> None:
        owner = self.owner()
        if owner is not None and owner.optimizer() is not None:
            owner.receive(self, param)


class GradientHooks:
    """Hooks of one optimizer on those parameters whose gradients it does not leave alone.

    Raises:
        ValueError: a parameter has such a hook already, of another optimizer that is still alive.
        RuntimeError: several ranks train together: a hook would see gradients before they are averaged.
    """

    def __init__(self, optimizer):
        _refuse_ranks()
        self.optimizer = weakref.ref(optimizer)
        self.hooks: dict[Tensor, _Hook] = {}
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        weakref.finalize(self, _remove, self.handles)
        self.add(optimizer.named())

    def add(self, named: list[tuple[Tensor, str, dict]]) -> None:
        """Hook the parameters that have no hook yet."""
        fresh = {p: name for p, name, _ in named if p not in self.hooks and self.wants(p, name)}
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

    def refuse_gradients(self) -> None:
        """Refuse gradients that were put into p.grad by hand: hooks have not seen them.

        Raises:
            RuntimeError: naming the parameters.
        """
        if any([p.grad is not None for p in self.hooks]):
            named = self.optimizer().named()
            names = [name for p, name, _ in named if p in self.hooks and p.grad is not None]
            raise RuntimeError(
                f"gradients must come from backward(), where hooks take them, but p.grad was set: {names}"
            )

    def wants(self, param: Tensor, name: str) -> bool:
        """Whether a parameter's gradient is to be received."""
        return param.requires_grad

    def receive(self, hook: _Hook, param: Tensor) -> None:
        """Take one parameter's gradient and free it."""
        raise NotImplementedError

    def pack(self) -> None:
        """Finish what `receive` has put off."""


class PackedGradients(GradientHooks):
    """Keeps the child's entries of each gradient, added up over several backward passes, and frees the rest.

    Gradients wait until TOGETHER bytes are together, and are packed in one launch: a launch each would take longer than
    the backward pass of a small model (H200, BERT-large, bf16, 32 x 128: 27 ms instead of 17).
    """

    def __init__(self, optimizer):
        self.waiting: list[tuple[_Hook, Tensor]] = []
        self.waiting_bytes = 0
        self.stream = None  # that the waiting gradients were made on
        super().__init__(optimizer)

    def wants(self, param, name):
        return param.requires_grad and not self.optimizer().packing.is_whole(name)

    def receive(self, hook, param):
        grad = param.grad
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
        optimizer, waiting, lists = self.optimizer(), self.waiting, {}
        self.waiting, self.waiting_bytes = [], 0
        packing = optimizer.packing
        with _on_stream(self.stream, waiting[0][1].device):
            for hook, grad in waiting:
                hook.waits = False
                alike = lists.setdefault((grad.device, grad.dtype, hook.grad is not None), ([], [], []))
                alike[0].append(hook)
                alike[1].append(grad.contiguous())
                alike[2].append(packing.indices(hook.name, grad.device))
            for (device, dtype, add), (hooks, grads, indices) in lists.items():
                if not add:
                    for hook, packed in zip(hooks, _empty(indices, dtype), strict=True):
                        hook.grad = packed
                packed = [hook.grad for hook in hooks]
                ops.implementation(optimizer.requested_impl, device.type).gather_child_(packed, grads, indices, add)

    def holder(self, param: Tensor) -> Tensor | _Hook:
        """Return what holds the parameter's gradient as ``grad``."""
        return self.hooks.get(param, param)

    def zero(self, set_to_none: bool) -> None:
        """Drop the packed gradients, or set them to zero."""
        self.pack()
        for hook in self.hooks.values():
            hook.grad = None if set_to_none or hook.grad is None else hook.grad.zero_()


class StepInBackward(GradientHooks):
    """Takes each parameter's step as soon as its gradient is there, and frees the gradient."""

    def __init__(self, optimizer):
        self.plans: dict[Tensor, Plan] = {}
        self.stepped: set[Tensor] = set()  # since the last step(): a second gradient would be a second step
        super().__init__(optimizer)

    @torch.no_grad()
    def receive(self, hook, param):
        _refuse_ranks()
        optimizer = self.optimizer()
        if param in self.stepped:
            raise RuntimeError(
                "fused_backward=True takes a step a backward pass, and step() must follow each; a second gradient of "
                f"shape {tuple(param.shape)} came before: accumulate gradients with pack_gradients=True instead"
            )
        plan = self.plans.get(param)
        if plan is None or not plan.fits(optimizer):
            plan = self.plans[param] = Plan(optimizer, [param])
        plan.run(optimizer)
        self.stepped.add(param)
        param.grad = None


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
