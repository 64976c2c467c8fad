"""Update: one step of the tensors of one device, the one thing that every implementation's `update_` takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .tensors import IntList, TensorList

# Columns of `Update.hyper`, one row a parameter.
HYPER_COLUMNS = (
    "lr",
    "beta1",
    "beta2",
    "eps",
    "weight_decay",
    "reserve_p",  # read where there are mask keys
    "sign",  # +1 to minimise, -1 to maximise
    "hf_dialect",  # 0 torch, 1 hf
    "max_grad_norm",  # inf: no clipping
    "decay_outside",  # 1: weights outside the child decay, as in the released code; read where there are mask words
)
RESERVE_P, DECAY_OUTSIDE = HYPER_COLUMNS.index("reserve_p"), HYPER_COLUMNS.index("decay_outside")

_NEEDED = ("params", "grads", "steps")  # beside the rule's moments; the others may be empty
_MOMENTS = ("exp_avgs", "exp_avg_sqs")
_TENSORS = (*_NEEDED, *_MOMENTS, "indices", "mask_words", "companions", "lrs")
_KEYS = ("mask_keys", "rounding_keys")


class Rule(NamedTuple):
    """The rule of an update; its formula is in a file of its name in each implementation."""

    name: str
    moments: tuple[str, ...]  # of each weight, by torch.optim's keys

    @property
    def file(self) -> str:
        """What its files and, with a ``_``, its op are called."""
        return self.name.lower()


ADAMW = Rule("AdamW", ("exp_avg", "exp_avg_sq"))


class Scaling(NamedTuple):
    """What is known of all gradients together: float32 [] each, on the parameters' device, or None."""

    grad_scale: Tensor | None = None  # gradients are divided by it
    found_inf: Tensor | None = None  # not 0: nothing is written
    grad_norm: Tensor | None = None  # of the gradients as stored, for max_grad_norm


@dataclass(eq=False, repr=False)
class Update:
    """One step of the tensors of one device; entry i of every list belongs to parameter i.

    M_t of Eq. 1-4 is data: mask words, indices or mask keys, by which launchers choose their kernels. Lists that have a
    default may be empty; at most one of ``indices`` and ``mask_words`` is given, and ``mask_words`` with neither keys
    nor companions.

    Attributes:
        params: float32, bfloat16 or float16, contiguous; a list may mix dtypes.
        grads: like params, contiguous, at any alignment; or packed like the moments, where there are indices. They are
            not written.
        exp_avgs, exp_avg_sqs: float32, bfloat16 or float16, one dtype a parameter, shaped like it; or packed, [m].
            Those that the rule does not have are empty lists.
        steps: float64 [], advanced by one; the new value is the mask stream's t, which stays at 2**32 - 1.
        hyper: float64 [n, len(HYPER_COLUMNS)] on the CPU.
        indices: packed D: int32 [m], the child's elements in ascending order. Or [0], with moments like params: the
            whole tensor; with moments [0]: nothing of it.
        mask_words: dense D: int32 [ceil(numel / 32)], or [0] for the whole tensor.
        mask_keys: F: signed 64-bit stream keys; each gradient element is kept with the row's ``reserve_p``.
        companions: like moments: float32, the master that a 16-bit weight is a copy of; or of its dtype, the
            compensation that it lacks; or [0]: none.
        rounding_keys: signed 64-bit stream keys: 16-bit weights without a companion are rounded stochastically.
        lrs: float32 [], replacing the table's lr: live under CUDA graphs.
        scaling: of all gradients together.
        rule: the formula.
        maps: what a launcher has derived of sizes and dtypes, which do not change while an update exists.
    """

    params: TensorList
    grads: TensorList
    exp_avgs: TensorList
    exp_avg_sqs: TensorList
    steps: TensorList
    hyper: Tensor
    indices: TensorList = field(default_factory=TensorList)
    mask_words: TensorList = field(default_factory=TensorList)
    mask_keys: IntList = field(default_factory=IntList)
    companions: TensorList = field(default_factory=TensorList)
    rounding_keys: IntList = field(default_factory=IntList)
    lrs: TensorList = field(default_factory=TensorList)
    scaling: Scaling = Scaling()
    rule: Rule = ADAMW
    maps: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        for name in _TENSORS:
            setattr(self, name, TensorList.of(getattr(self, name)))
        for name in _KEYS:
            setattr(self, name, IntList.of(getattr(self, name)))

    def __len__(self) -> int:
        return len(self.params)

    @property
    def device(self) -> torch.device:
        """Of all tensors but the table."""
        return self.params[0].device

    @property
    def moments(self) -> tuple[TensorList, ...]:
        """The lists that the rule has, in its order."""
        return tuple(getattr(self, f"{moment}s") for moment in self.rule.moments)

    @property
    def draws(self) -> bool:
        """Whether a gradient mask is drawn: there are keys, and some parameter keeps less than every element."""
        return bool(self.mask_keys) and bool((self.hyper.numpy()[:, RESERVE_P] < 1).any())

    @property
    def decays_outside(self) -> bool:
        """Whether weights outside some parameter's child decay."""
        return bool(self.mask_words) and bool((self.hyper.numpy()[:, DECAY_OUTSIDE] != 0).any())

    @property
    def written(self) -> tuple[TensorList, ...]:
        """The lists of tensors that an update writes."""
        return self.params, *self.moments, self.steps, self.companions

    def check(self) -> None:
        """Refuse what differs from the attributes' description, before anything is written.

        Raises:
            RuntimeError, TypeError, ValueError: naming the list and entry, what was expected and what came.
        """
        self._check_lengths()
        checks.check_table("hyper", self.hyper, len(self), len(HYPER_COLUMNS))
        if self.mask_words and (self.indices or self.mask_keys or self.companions or self.rounding_keys):
            raise RuntimeError("mask_words must be alone, got indices, keys or companions beside them")
        if self.mask_keys:
            for p in self.hyper[:, RESERVE_P].tolist():
                checks.check_probability("hyper's reserve_p", p)
        for i in range(len(self)):
            self._check_parameter(i)
        for name, value in zip(Scaling._fields, self.scaling, strict=True):
            if len(self) and value is not None:
                checks.check_scalar(name, value, self.device)

    def _check_lengths(self) -> None:
        moments = [f"{moment}s" for moment in self.rule.moments]
        for name in (*_TENSORS, *_KEYS):
            values = getattr(self, name)
            if values and name in _MOMENTS and name not in moments:
                raise RuntimeError(f"{name} must be empty for {self.rule.name}, got {len(values)} entries")
            if len(values) != len(self) and (values or name in _NEEDED or name in moments):
                raise RuntimeError(f"{name} must have {len(self)} entries, one a parameter, got {len(values)}")

    def _check_parameter(self, i: int) -> None:
        param, grad, exp_avg = self.params[i], self.grads[i], self.exp_avgs[i]
        checks.check_parameter(f"params[{i}]", param)
        if param.device != self.device:
            raise RuntimeError(f"params[{i}] must have the list's device {self.device}, got {param.device}")
        shape = tuple(param.shape)
        if self.indices:
            shape = checks.check_indices(f"indices[{i}]", self.indices[i], param, exp_avg)
            checks.check_packed_gradient(f"params[{i}]", grad, param, shape)
        else:
            checks.check_gradient(f"params[{i}]", grad, param)
        moments = {name: tensors[i] for name, tensors in zip(self.rule.moments, self.moments, strict=True)}
        checks.check_state(f"state {i}", param, self.steps[i], moments, shape)
        if self.companions:
            checks.check_companion(f"companions[{i}]", self.companions[i], param, shape)
        if self.lrs:
            checks.check_scalar(f"lrs[{i}]", self.lrs[i], param.device)
        for name, value in (("params", param), ("grads", grad)):
            if not value.is_contiguous():
                raise RuntimeError(f"{name}[{i}] must be contiguous, got strides {value.stride()}")
        if self.mask_words:
            checks.check_words(f"mask_words[{i}]", self.mask_words[i], param)
