"""The ops: one schema a meaning, several implementations each; the only room that knows kernels exist.

Every implementation of an op gives bitwise the same weights, moments and masks. Schemas are Python strings, so
the package works, slower, with no compiler and no Triton:

    reference   eager torch, any device             reference/, the meaning of each op
    csrc        C++ on CPU, CUDA C++ on CUDA        ../../csrc, where it was built
    triton      CUDA (CPU under TRITON_INTERPRET=1)  triton/, where Triton is installed

`torch.ops.childtune.<op>` checks its arguments and runs the implementation measured fastest for the device.
`implementation(name, device)` gives one implementation's functions, unchecked: the optimizer, which has checked,
calls these (a Python-registered op costs 0.4 us a tensor and list on top).
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import torch

from . import checks, csrc, reference
from .reference import HYPER_COLUMNS as HYPER_COLUMNS
from .reference import pack_bits as pack_bits
from .reference import score_of_key as score_of_key
from .reference import unpack_bits as unpack_bits

_UPDATE = (
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, "
    "Tensor hyper, {extra}Tensor[] lrs, Tensor? grad_scale=None, Tensor? found_inf=None, Tensor? grad_norm=None) -> ()"
)
_LOW_PRECISION = "Tensor(e!)[] companions, int[] rounding_keys, "
# params        float32, bfloat16 or float16, contiguous; the list may mix dtypes, not devices
# grads         like params, contiguous, any alignment, never written
# exp_avgs, exp_avg_sqs   shaped like params; one dtype a parameter
# indices       int32 [m]: the child's elements in ascending order; moments are then [m], grads [m] or like params.
#               Or [0], with moments like params: the whole tensor; with moments [0]: nothing of it
# steps         float64 [], advanced by one; the new value is the mask stream's t, which stays at 2**32 - 1
# hyper         float64 [n, len(HYPER_COLUMNS)] on CPU
# lrs           empty, or float32 [] per parameter, replacing hyper's lr: live under CUDA graphs
# grad_scale    gradients are divided by it; found_inf: not 0, nothing is written; grad_norm: for max_grad_norm
# companions    empty, or one a parameter, like its moments: float32, the master that a 16-bit weight is a copy of; or
#               of its dtype, the compensation that it lacks; or [0]: none
# rounding_keys empty, or signed 64-bit stream keys: 16-bit weights without a companion are rounded stochastically
# total         float32 [O, I] or [O], float64 beside float64; d [B, T, O], x [B, T, I], factor [B, T, O]: any strides
#               but the last dimension's; plain_total: [O], the same without factor
# keys          signed 64-bit stream keys; mask_words: int32 [ceil(numel / 32)], or [0] for the whole tensor
# scores        like params; thresholds: one a tensor; digits: how many bits of the keys one histogram tells apart
SCHEMAS = {
    "adamw_": _UPDATE.format(extra=_LOW_PRECISION),
    "adamw_bernoulli_": _UPDATE.format(extra="int[] keys, " + _LOW_PRECISION),
    "adamw_masked_": _UPDATE.format(extra="Tensor[] mask_words, bool decay_all, "),
    "adamw_compact_": _UPDATE.format(extra="Tensor[] indices, int[] keys, " + _LOW_PRECISION),
    "gather_child_": "(Tensor(a!)[] packed, Tensor[] grads, Tensor[] indices, bool add) -> ()",
    "square_accumulate_": "(Tensor(a!)[] accumulators, Tensor[] grads, float scale) -> ()",
    "fisher_linear_": "(Tensor(a!) total, Tensor d, Tensor x) -> ()",
    "fisher_columns_": "(Tensor(a!) total, Tensor d, Tensor? factor=None, Tensor(b!)? plain_total=None) -> ()",
    "bernoulli_bits": "(int numel, int key, int step, float p, int domain, int offset, Device device) -> Tensor",
    "score_histogram": "(Tensor[] scores, int[] firsts, int shift, int digits) -> Tensor",
    "threshold_bits": "(Tensor[] scores, float[] thresholds, int[] tie_ends, bool lowest=False) -> Tensor",
    "popcount_bits": "(Tensor words) -> Tensor",
    "overlap_bits": "(Tensor a, Tensor b) -> Tensor",
}
UPDATES = ("adamw_", "adamw_bernoulli_", "adamw_masked_", "adamw_compact_")
# The compiled kernel fills its words: an op without a tensor argument has no device to be dispatched on.
_CSRC_SCHEMAS = SCHEMAS | {
    "bernoulli_bits": "(Tensor(a!) words, int numel, int key, int step, float p, int domain, int offset) -> ()"
}
# Products, sums, gathers: torch's own libraries are the compiled way, so csrc has no kernel of its own.
_WITHOUT_CSRC = ("fisher_linear_", "fisher_columns_", "gather_child_")
IMPLEMENTATIONS = ("triton", "csrc", "reference")
# How many bits of a key an implementation's `score_histogram` counts at its best: csrc in shared memory or cache,
# Triton by comparing in registers. Each serves every width up to reference.MAX_DIGITS.
_DIGITS = {"triton": 4, "csrc": 11, "reference": 11}

_library = torch.library.Library("childtune", "FRAGMENT")  # held here: dropping it would unregister the ops


def unavailable(name: str, device_type: str) -> str | None:
    """Return why an implementation cannot serve a device type, or None where it can."""
    if name == "reference":
        return None
    if name == "csrc":
        return csrc.unavailable(device_type)
    return _triton_unavailable(device_type)


@functools.cache
def implementation(name: str, device_type: str) -> SimpleNamespace:
    """Return the functions of one implementation, one attribute an op, its ``name`` and the ``digits`` it counts best.

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
    if name == "csrc":
        functions = {op: getattr(torch.ops.childtune, op).csrc for op in SCHEMAS if op not in _WITHOUT_CSRC}
        functions |= {op: getattr(reference, op) for op in _WITHOUT_CSRC}
        functions["bernoulli_bits"] = _csrc_bernoulli_bits
    elif name == "triton":
        from . import triton

        functions = {op: getattr(triton, op) for op in SCHEMAS}
    else:
        functions = {op: getattr(reference, op) for op in SCHEMAS}
    return SimpleNamespace(name=name, digits=_DIGITS[name], **functions)


def _csrc_bernoulli_bits(numel, key, step, p, domain, offset, device):
    words = _words(numel, device)
    torch.ops.childtune.bernoulli_bits.csrc(words, numel, key, step, p, domain, offset)
    return words


def _triton_unavailable(device_type: str) -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    if device_type == "cuda" or (device_type == "cpu" and triton.knobs.runtime.interpret):
        return None
    return "Triton serves CUDA tensors, and CPU tensors only under TRITON_INTERPRET=1"


def _update_op(op: str):
    names = [part.split()[-1] for part in SCHEMAS[op].split("->")[0].strip(" ()").split(", ")]
    names = [name.split("=")[0] for name in names[6:]]

    def run(params, grads, exp_avgs, exp_avg_sqs, steps, hyper, *rest):
        extra = dict(zip(names, rest, strict=False))  # the dispatcher leaves out trailing defaults
        checks.check_update(params, grads, exp_avgs, exp_avg_sqs, steps, hyper, extra)
        if params:
            kernel = getattr(implementation("auto", params[0].device.type), op)
            kernel(params, grads, exp_avgs, exp_avg_sqs, steps, hyper, *rest)
            mark_written(params, exp_avgs, exp_avg_sqs, steps, extra.get("companions", ()))

    return run


def mark_written(*lists) -> None:
    """Advance version counters, which raw kernels leave alone, so that autograd notices the writes."""
    for tensors in lists:
        torch.autograd.graph.increment_version(tensors)


def _square_accumulate(accumulators, grads, scale):
    checks.check_accumulate(accumulators, grads)
    if accumulators:
        implementation("auto", accumulators[0].device.type).square_accumulate_(accumulators, grads, scale)
        mark_written(accumulators)


def _gather_child(packed, grads, indices, add):
    checks.check_gather(packed, grads, indices)
    if packed:
        implementation("auto", packed[0].device.type).gather_child_(packed, grads, indices, add)
        mark_written(packed)


def _fisher_linear(total, d, x):
    checks.check_fisher(total, d, x, None, (d.shape[-1], x.shape[-1]))
    implementation("auto", total.device.type).fisher_linear_(total, d, x)
    mark_written([total])


def _fisher_columns(total, d, factor=None, plain_total=None):
    checks.check_fisher(total, d, factor, plain_total, (d.shape[-1],))
    implementation("auto", total.device.type).fisher_columns_(total, d, factor, plain_total)
    mark_written([total] if plain_total is None else [total, plain_total])


def _bernoulli_bits(numel, key, step, p, domain, offset, device):
    checks.check_stream(numel, step, p, domain, offset)
    return implementation("auto", device.type).bernoulli_bits(numel, key, step, p, domain, offset, device)


def _score_histogram(scores, firsts, shift, digits):
    checks.check_histogram(scores, firsts, shift, digits)
    kernels = implementation("auto", scores[0].device.type) if scores else reference
    return kernels.score_histogram(scores, firsts, shift, digits)


def _threshold_bits(scores, thresholds, tie_ends, lowest=False):
    checks.check_thresholds(scores, thresholds, tie_ends)
    kernels = implementation("auto", scores[0].device.type) if scores else reference
    return kernels.threshold_bits(scores, thresholds, tie_ends, lowest)


def _popcount_bits(words):
    checks.check_packed("words", words)
    return implementation("auto", words.device.type).popcount_bits(words)


def _overlap_bits(a, b):
    checks.check_overlap(a, b)
    return implementation("auto", a.device.type).overlap_bits(a, b)


_RUN = {
    **{op: _update_op(op) for op in UPDATES},
    "gather_child_": _gather_child,
    "square_accumulate_": _square_accumulate,
    "fisher_linear_": _fisher_linear,
    "fisher_columns_": _fisher_columns,
    "bernoulli_bits": _bernoulli_bits,
    "score_histogram": _score_histogram,
    "threshold_bits": _threshold_bits,
    "popcount_bits": _popcount_bits,
    "overlap_bits": _overlap_bits,
}


def _words(numel: int, device) -> torch.Tensor:
    return torch.empty((numel + 31) // 32, dtype=torch.int32, device=device)


_FAKES = {
    **dict.fromkeys((*UPDATES, "square_accumulate_"), lambda *args: None),
    **dict.fromkeys(_WITHOUT_CSRC, lambda *args: None),
    "bernoulli_bits": lambda numel, key, step, p, domain, offset, device: _words(numel, device),
    "score_histogram": lambda scores, firsts, shift, digits: scores[0].new_empty(
        (len(scores), 2**digits + 1), dtype=torch.int64
    ),
    "threshold_bits": lambda scores, *args: scores[0].new_empty(
        sum((tensor.numel() + 31) // 32 for tensor in scores), dtype=torch.int32
    ),
    "popcount_bits": lambda words: torch.empty((), dtype=torch.int64, device=words.device),
    "overlap_bits": lambda a, b: torch.empty(2, dtype=torch.int64, device=a.device),
}
_CSRC_FAKES = _FAKES | {"bernoulli_bits": lambda *args: None}

for _op in SCHEMAS:
    # csrc registers its kernels on the overload when its library is loaded
    for _overload, _schemas, _fakes in (("", SCHEMAS, _FAKES), (".csrc", _CSRC_SCHEMAS, _CSRC_FAKES)):
        if _overload and _op in _WITHOUT_CSRC:
            continue
        _library.define(_op + _overload + _schemas[_op], tags=torch.Tag.pt2_compliant_tag)
        torch.library.register_fake(f"childtune::{_op}{_overload}", _fakes[_op], lib=_library)
    _library.impl(_op, _RUN[_op], "CompositeExplicitAutograd")
csrc.load()

adamw_ = torch.ops.childtune.adamw_
adamw_bernoulli_ = torch.ops.childtune.adamw_bernoulli_
adamw_masked_ = torch.ops.childtune.adamw_masked_
adamw_compact_ = torch.ops.childtune.adamw_compact_
gather_child_ = torch.ops.childtune.gather_child_
square_accumulate_ = torch.ops.childtune.square_accumulate_
fisher_linear_ = torch.ops.childtune.fisher_linear_
fisher_columns_ = torch.ops.childtune.fisher_columns_
bernoulli_bits = torch.ops.childtune.bernoulli_bits
score_histogram = torch.ops.childtune.score_histogram
threshold_bits = torch.ops.childtune.threshold_bits
popcount_bits = torch.ops.childtune.popcount_bits
overlap_bits = torch.ops.childtune.overlap_bits
