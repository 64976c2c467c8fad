"""The eager meaning of the update op: which elements take a step, from which gradients, and what is stored."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from ... import philox
from ..update import DECAY_OUTSIDE, RESERVE_P, Update
from .adamw import LAST_STEP, Scalars, decay_weights, derive_scalars
from .bits import unpack_bits
from .rounding import left_over, round_stochastically, standing_weights


def update_(update: Update) -> None:
    """Take one step by the update's rule with the gradients that Child-Tuning leaves.

    Every weight (no masks), F (Eq. 4: mask keys, a fresh mask each step, kept gradients times 1/p; every moment and
    weight decays), D (Eq. 1-3: mask words or indices; moments outside the child are not touched or do not exist, and
    weights there at most decay), or F inside D's child (keys beside indices).
    """
    if not len(update):
        return
    step = _Step(update)
    for i in range(len(update)):
        if update.mask_words and update.mask_words[i].numel():
            step.update_by_words(i)
        elif update.exp_avgs[i].numel():  # else nothing of it is in the child
            step.update_by_indices(i)


class _Step:
    """An update under way: advances the counters, derives the scalars, and writes nothing under found_inf."""

    def __init__(self, update: Update):
        device, steps = update.device, update.steps
        grad_scale, found_inf, grad_norm = (None if x is None else x.to(device) for x in update.scaling)
        self.update = update
        self.formula = import_module(f".{update.rule.file}", __package__)
        self.skip = None if found_inf is None else found_inf != 0
        self.t = (torch.stack([step.to(torch.int64) for step in steps]) + 1).clamp(max=LAST_STEP)
        lrs = torch.stack(update.lrs) if update.lrs else None
        hyper = update.hyper.to(device)
        columns = derive_scalars(self.formula.step_size, self.t, hyper, lrs, grad_scale, grad_norm)
        self.scalars = [Scalars(*row) for row in zip(*(column.unbind() for column in columns), strict=True)]
        for step in steps:
            self.write(step, step + 1)

    def update_by_words(self, i: int) -> None:
        """Update parameter i, whose moments are shaped like it, where a bit of its mask words is set."""
        update, s = self.update, self.scalars[i]
        param, moments = update.params[i], [tensors[i] for tensors in update.moments]
        g = update.grads[i].float() * s.grad_multiplier
        w, new = self.formula.advance(param.float(), g, [moment.float() for moment in moments], s)
        keep = unpack_bits(update.mask_words[i], param.numel()).view(param.shape)
        outside = decay_weights(param, s) if update.hyper[i, DECAY_OUTSIDE] else param.float()
        self.write(param, torch.where(keep, w, outside))
        for moment, value in zip(moments, new, strict=True):
            self.write(moment, torch.where(keep, value, moment.float()))

    def update_by_indices(self, i: int) -> None:
        """Update all that parameter i has moments of: entry j belongs to element ``indices[i][j]``, or to element j."""
        update, s = self.update, self.scalars[i]
        param, moments = update.params[i], [tensors[i] for tensors in update.moments]
        whole = not (update.indices and update.indices[i].numel())
        elements = torch.arange(param.numel(), device=param.device) if whole else update.indices[i].long()
        flat, grad = param.view(-1), update.grads[i].reshape(-1)
        grad = grad if grad.numel() == elements.numel() else grad[elements]
        g = self.sampled(i, grad.view(moments[0].shape).float() * s.grad_multiplier, elements)
        weights = param if whole else flat[elements]
        self.update_weights(i, weights, elements, g, moments)
        if not whole:
            flat[elements] = weights

    def sampled(self, i: int, g: Tensor, elements: Tensor) -> Tensor:
        """Return F's gradient of the given elements of parameter i."""
        if not self.update.mask_keys or (p := self.update.hyper[i, RESERVE_P].item()) == 1:
            return g
        keep = philox.keep_bits(elements, self.update.mask_keys[i], self.t[i], p).view(g.shape)
        return torch.where(keep, g * self.scalars[i].inv_p, 0.0)  # Eq. 4

    def update_weights(self, i: int, param: Tensor, elements: Tensor, g: Tensor, moments: list[Tensor]) -> None:
        """Update ``param``, which holds the given elements of parameter i, and their moments."""
        update, dtype = self.update, param.dtype
        companion = update.companions[i] if update.companions else None
        has_companion = companion is not None and companion.numel() and dtype != torch.float32
        w = standing_weights(param, companion) if has_companion else param.float()
        w, new = self.formula.advance(w, g, [moment.float() for moment in moments], self.scalars[i])
        for moment, value in zip(moments, new, strict=True):
            self.write(moment, value)
        if not has_companion:
            if update.rounding_keys and dtype != torch.float32:
                words = philox.words(elements, update.rounding_keys[i], self.t[i], philox.STOCHASTIC_ROUNDING)
                w = round_stochastically(w, words.view(w.shape), dtype)
        else:
            self.write(companion, w if companion.dtype == torch.float32 else left_over(w, dtype))
        self.write(param, w)

    def write(self, target: Tensor, value: Tensor) -> None:
        """Store ``value``, rounded to nearest even if ``target`` is 16 bit."""
        value = value.to(target.dtype)
        target.copy_(value if self.skip is None else torch.where(self.skip, target, value))
