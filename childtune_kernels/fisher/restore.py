"""A model lent for a pass: what is changed on the way is put back."""

from __future__ import annotations

import contextlib
import functools
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint as checkpointing
from torch import nn

from ..names import named_parameters


@contextlib.contextmanager
def mode(model: nn.Module, training: bool):
    before = {module: module.training for module in model.modules()}
    try:
        model.train(training)
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


@contextlib.contextmanager
def random_state():
    """Put back what torch (CPU and all CUDA devices), numpy and python draw from by default."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])
        if on_devices is not None:
            torch.cuda.set_rng_state_all(on_devices)
        elif torch.cuda.is_initialized():  # in the meantime: what was drawn is the first of each device's seed
            for generator in torch.cuda.default_generators:
                generator.manual_seed(generator.initial_seed())


@contextlib.contextmanager
def borrowed(model: nn.Module, training: bool):
    """Lend the model: its modes and buffers are put back."""
    put_back = _copied(model)
    with mode(model, training), torch.enable_grad():
        with _without_checkpointing(model):
            try:
                yield
            finally:
                put_back()


def _copied(model: nn.Module) -> Callable[[], None]:
    """Copy what a forward pass may change; return the function that puts it back.

    That is buffers, written to or replaced, and the weights that an embedding with ``max_norm`` rescales in place.
    """
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    rescaled = [m for m in model.modules() if getattr(m, "max_norm", None) is not None]
    changeable = [*model.buffers(), *(p for m in rescaled for p in m.parameters(recurse=False))]
    values = [(tensor, tensor.detach().clone()) for tensor in changeable]

    @torch.no_grad()
    def put_back() -> None:
        for module, before in buffers:
            module._buffers.update(before)
        for tensor, value in values:
            if not torch.equal(tensor, value):
                tensor.copy_(value)

    return put_back


_ONE_PASS = threading.RLock()  # the replacements are the process's, and come off in the order they went on
_IN_USE = (
    "the model saves activations in a way that cannot be left out of estimate_fisher: turn activation "
    "checkpointing or offloading off for the pass"
)


@contextlib.contextmanager
def _without_checkpointing(model: nn.Module):
    """Let this thread's activation checkpoints call their function and no more.

    A recomputation would use the parameters outside the tape. Checkpoints of every make either keep a recipe in the
    place of a tensor, by saved-tensor hooks, or are torch's reentrant function: here neither happens. Whatever
    recomputes all the same is refused: hooks that are set another way, and backward passes that accumulate.

    Raises:
        RuntimeError: saved-tensor hooks are active around the pass; during it, what is said above.
    """
    owner = threading.get_ident()
    hooks, reentrant = torch.autograd.graph.saved_tensors_hooks, checkpointing.CheckpointFunction
    enter, leave, apply = hooks.__enter__, hooks.__exit__, reentrant.apply

    def enter_elsewhere(self):
        return enter(self) if threading.get_ident() != owner else None

    def leave_elsewhere(self, *raised: bool):
        return leave(self, *raised) if threading.get_ident() != owner else None

    def call(function: Callable, preserve_rng_state: bool, *args: Any):
        elsewhere = threading.get_ident() != owner
        return apply(function, preserve_rng_state, *args) if elsewhere else function(*args)

    with contextlib.ExitStack() as stack:
        stack.enter_context(_ONE_PASS)
        stack.enter_context(torch.autograd.graph.disable_saved_tensors_hooks(_IN_USE))
        stack.enter_context(_replaced(hooks, "__enter__", enter_elsewhere))
        stack.enter_context(_replaced(hooks, "__exit__", leave_elsewhere))
        stack.enter_context(_replaced(reentrant, "apply", staticmethod(call)))
        stack.enter_context(_accumulating_nothing(model))
        yield


@contextlib.contextmanager
def _replaced(owner: type, name: str, value: object):
    own = vars(owner).get(name)  # None: inherited
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


@contextlib.contextmanager
def _accumulating_nothing(model: nn.Module):
    """Raise before anything is added to a parameter's ``.grad``, and at the end if it was written by hand."""

    def refuse(name: str, *grads: tuple):
        raise RuntimeError(f"{name!r} received a gradient from a backward pass inside the loss or the model: {_IN_USE}")

    leaves = {n: p for n, p in named_parameters(model).items() if p.requires_grad and p.is_leaf}
    kept = {n: p.grad for n, p in leaves.items()}
    nodes = {n: torch.autograd.graph.get_gradient_edge(p).node for n, p in leaves.items()}  # live while they are held
    handles = [node.register_prehook(functools.partial(refuse, name)) for name, node in nodes.items()]
    try:
        for param in leaves.values():
            param.grad = None
        yield
        for name, param in leaves.items():
            if param.grad is not None:
                refuse(name)
    finally:
        for handle in handles:
            handle.remove()
        for name, param in leaves.items():
            param.grad = kept[name]
