"""A model lent for a pass: what is changed on the way is put back."""

from __future__ import annotations

import contextlib
import random

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
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    with mode(model, training), torch.enable_grad():
        with _without_checkpointing():
            try:
                yield
            finally:
                with torch.no_grad():
                    for buffer, value in buffers:
                        if not torch.equal(buffer, value):
                            buffer.copy_(value)


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
