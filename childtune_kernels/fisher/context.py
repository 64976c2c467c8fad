"""A model lent for a pass: what is changed on the way is put back."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable

import numpy as np
import torch
import torch.utils.checkpoint as checkpointing
from torch import nn


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
        with _without_checkpointing():
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


@contextlib.contextmanager
def _without_checkpointing():
    """Let torch.utils.checkpoint call its function and no more: a recomputation happens outside the tape's mode."""
    before = {name: getattr(checkpointing, name) for name in _DIRECT}
    for name, replacement in _DIRECT.items():
        setattr(checkpointing, name, replacement)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(checkpointing, name, value)


class _DirectFunction:
    """Stands for the reentrant kind's autograd function."""

    @staticmethod
    def apply(function, preserve_rng_state, *args):
        return function(*args)


def _direct_generator(function, *args, **kwargs):
    """Stands for the other kind's two steps, before and after the function is called."""
    yield


_DIRECT = {"CheckpointFunction": _DirectFunction, "_checkpoint_without_reentrant_generator": _direct_generator}
