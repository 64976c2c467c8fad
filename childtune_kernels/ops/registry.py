"""What torch knows of each op, and where each implementation is: one entry each, one runner for all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import checks, csrc, reference
from .update import ADAMW, Rule, Scaling, Update

_SAME = "the same"
_SCALING = [field.name for field in fields(Update)].index("scaling")  # the op's arguments from there on are its fields


@dataclass(frozen=True)
class Op:
    """One op, which every implementation's module has a function of.

    Attributes:
        schema: its arguments as torch sees them; those marked ``!`` are written.
        check: refuses arguments of the functions, before anything is written.
        fake: the result's form alone, for tracing; ops that return nothing have none.
        takes: makes the functions' arguments of the schema's.
        rule: of an update; its functions are called `update_`, whatever the rule.
        csrc_schema: of the compiled kernel, where that is another; None where there is none.
    """

    schema: str
    check: Callable[..., None]
    fake: Callable[..., Tensor] | None = None
    takes: Callable[..., tuple] = lambda *args: args
    csrc_schema: str | None = _SAME
    rule: Rule | None = None

    @property
    def overloads(self) -> dict[str, str]:
        """The schemas by overload; csrc registers its kernels on its own when its library is loaded."""
        compiled = self.schema if self.csrc_schema == _SAME else self.csrc_schema
        return {"": self.schema} | ({} if compiled is None else {".csrc": compiled})


@dataclass(frozen=True)
class Implementation:
    """One implementation: its module, imported when it is asked for, and why it cannot serve a device type, if so."""

    module: str
    unavailable: Callable[[str], str | None]


def _triton_unavailable(device_type: str) -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    if device_type == "cuda" or (device_type == "cpu" and triton.knobs.runtime.interpret):
        return None
    return "Triton serves CUDA tensors, and CPU tensors only under TRITON_INTERPRET=1"


def _update(rule: Rule) -> Op:
    """Return the op of an update by a rule; `Update` describes its arguments."""
    return Op(
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, "
        "Tensor hyper, Tensor[] indices, Tensor[] mask_words, int[] mask_keys, Tensor(e!)[] companions, "
        "int[] rounding_keys, Tensor[] lrs, Tensor? grad_scale=None, Tensor? found_inf=None, Tensor? grad_norm=None) "
        "-> ()",
        check=Update.check,
        takes=lambda *args: (Update(*args[:_SCALING], Scaling(*args[_SCALING:]), rule),),
        rule=rule,
    )


OPS = {
    "adamw_": _update(ADAMW),
    "gather_child_": Op(  # packed: [m]; grads: of any shape; indices: int32 [m]
        "(Tensor(a!)[] packed, Tensor[] grads, Tensor[] indices, bool add) -> ()",
        check=lambda packed, grads, indices, add: checks.check_gather(packed, grads, indices),
        csrc_schema=None,
    ),
    "square_accumulate_": Op(  # accumulators: float32, shaped like grads
        "(Tensor(a!)[] accumulators, Tensor[] grads, float scale) -> ()",
        check=lambda accumulators, grads, scale: checks.check_accumulate(accumulators, grads),
    ),
    # total: float32 [O, I] or [O], float64 beside float64; d [B, T, O], x [B, T, I], factor [B, T, O]: any strides but
    # the last dimension's; plain_total: [O], the same without factor
    "fisher_linear_": Op(
        "(Tensor(a!) total, Tensor d, Tensor x) -> ()",
        check=lambda total, d, x: checks.check_fisher(total, d, x, None, (d.shape[-1], x.shape[-1])),
        csrc_schema=None,
    ),
    "fisher_columns_": Op(
        "(Tensor(a!) total, Tensor d, Tensor? factor=None, Tensor(b!)? plain_total=None) -> ()",
        check=lambda total, d, factor=None, plain_total=None: checks.check_fisher(
            total, d, factor, plain_total, (d.shape[-1],)
        ),
        csrc_schema=None,
    ),
    "bernoulli_bits": Op(  # key: signed 64-bit
        "(int numel, int key, int step, float p, int domain, int offset, Device device) -> Tensor",
        check=lambda numel, key, step, p, domain, offset, device: checks.check_stream(numel, step, p, domain, offset),
        fake=lambda numel, key, step, p, domain, offset, device: torch.empty(
            (numel + 31) // 32, dtype=torch.int32, device=device
        ),
        # fills its words: an op without a tensor argument has no device to be dispatched on
        csrc_schema="(Tensor(a!) words, int numel, int key, int step, float p, int domain, int offset) -> ()",
    ),
    "score_histogram": Op(  # digits: how many bits of the keys one histogram tells apart
        "(Tensor[] scores, int[] firsts, int shift, int digits) -> Tensor",
        check=checks.check_histogram,
        fake=lambda scores, firsts, shift, digits: scores[0].new_empty((len(scores), 2**digits + 1), dtype=torch.int64),
    ),
    "threshold_bits": Op(  # thresholds, tie_ends: one a tensor
        "(Tensor[] scores, float[] thresholds, int[] tie_ends, bool lowest=False) -> Tensor",
        check=lambda scores, thresholds, tie_ends, lowest=False: checks.check_thresholds(scores, thresholds, tie_ends),
        fake=lambda scores, *args: scores[0].new_empty(
            sum((tensor.numel() + 31) // 32 for tensor in scores), dtype=torch.int32
        ),
    ),
    "popcount_bits": Op(
        "(Tensor words) -> Tensor",
        check=lambda words: checks.check_packed("words", words),
        fake=lambda words: torch.empty((), dtype=torch.int64, device=words.device),
    ),
    "overlap_bits": Op(
        "(Tensor a, Tensor b) -> Tensor",
        check=checks.check_overlap,
        fake=lambda a, b: torch.empty(2, dtype=torch.int64, device=a.device),
    ),
}
IMPLEMENTATIONS = {
    "triton": Implementation(".triton", _triton_unavailable),
    "csrc": Implementation(".csrc", csrc.unavailable),
    "reference": Implementation(".reference", lambda device_type: None),
}


def unavailable(name: str, device_type: str) -> str | None:
    """Return why an implementation cannot serve a device type, or None where it can."""
    return IMPLEMENTATIONS[name].unavailable(device_type)


@functools.cache
def implementation(name: str, device_type: str) -> ModuleType:
    """Return the module of one implementation: a function an op, unchecked, its ``NAME`` and the ``DIGITS`` it counts.

    Args:
        name: "triton", "csrc", "reference", or "auto" for the fastest available one.
        device_type: "cpu", "cuda", ...

    Raises:
        ValueError: no such name.
        RuntimeError: the implementation is not available here, with the reason. A named one never falls back.
    """
    if name == "auto":
        order = ("csrc", "reference") if device_type == "cpu" else IMPLEMENTATIONS
        name = next(choice for choice in order if unavailable(choice, device_type) is None)
    elif name not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {('auto', *IMPLEMENTATIONS)}, got {name!r}")
    elif reason := unavailable(name, device_type):
        raise RuntimeError(f"impl={name!r} is not available for {device_type} tensors: {reason}")
    return import_module(IMPLEMENTATIONS[name].module, __package__)


def mark_written(*lists: Iterable[Tensor]) -> None:
    """Advance version counters, which raw kernels leave alone, so that autograd notices the writes."""
    for tensors in lists:
        torch.autograd.graph.increment_version(tensors)


def _device_of(args: Iterable[Any]) -> torch.device | None:
    """Return the device that an op's arguments are on: the first that one of them names."""
    for arg in args:
        if isinstance(arg, torch.device):
            return arg
        if isinstance(arg, list) and arg:
            arg = arg[0]
        if isinstance(arg, Tensor):
            return arg.device
    return None


def _runner(name: str, op: Op) -> Callable[..., Tensor | None]:
    """Return what the dispatcher calls: checks, runs the fastest implementation, marks what was written."""
    arguments = getattr(torch.ops.childtune, name).default._schema.arguments
    written = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]

    def run(*args: Any) -> Tensor | None:  # without trailing arguments that have their defaults
        taken = op.takes(*args)
        op.check(*taken)
        device = _device_of(args)
        kernels = reference if device is None else implementation("auto", device.type)  # no tensors: nothing to do
        result = getattr(kernels, "update_" if op.rule else name)(*taken)
        values = [args[i] for i in written if i < len(args) and args[i] is not None]
        mark_written(*(value if isinstance(value, list) else [value] for value in values))
        return result

    return run


_library = torch.library.Library("childtune", "FRAGMENT")  # held here: dropping it would unregister the ops


def _register(name: str, op: Op) -> None:
    for overload, schema in op.overloads.items():
        _library.define(name + overload + schema, tags=torch.Tag.pt2_compliant_tag)
        fake = (lambda *args: None) if schema.endswith("-> ()") else op.fake
        torch.library.register_fake(f"childtune::{name}{overload}", fake, lib=_library)
    _library.impl(name, _runner(name, op), "CompositeExplicitAutograd")


for _name, _op in OPS.items():
    _register(_name, _op)
csrc.load()
