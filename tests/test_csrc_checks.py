"""What csrc itself refuses: the optimizer calls its kernels without the ops' own checks before them."""

from __future__ import annotations

import math
import re

import pytest
import torch
from cases import snapshot, unchanged
from test_ops_contract import _put, _row, _set, _strided, arguments, positional, tensors_of

from childtune_kernels import ops

if reason := ops.unavailable("csrc", "cpu"):
    pytest.skip(reason, allow_module_level=True)
KERNELS = ops.implementation("csrc", "cpu")
HALF, BF16, F64 = torch.float16, torch.bfloat16, torch.float64
PLAIN, F, D, C = ops.UPDATES
ALL, LOW, KEYED = ops.UPDATES, (PLAIN, F, C), (F, C)
FLOATS, INTS = torch.zeros(4), torch.zeros(4, dtype=torch.int32)
FOLDED = torch.zeros(2, 4).t()


def index(n: int, **kwargs) -> torch.Tensor:
    return torch.arange(n, **{"dtype": torch.int32, **kwargs})


# For which ops, the change, and what the error says. Parameters: float32 (5,), bfloat16 (3, 7), float16 (0,).
UPDATES = [
    (ALL, _put("grads", lambda v: v[:2]), "grads must have 3 entries, one a parameter, got 2"),
    (ALL, _put("exp_avgs", lambda v: v[:2]), "exp_avgs must have 3 entries, one a parameter, got 2"),
    (ALL, _put("exp_avg_sqs", lambda v: v[:2]), "exp_avg_sqs must have 3 entries, one a parameter, got 2"),
    (ALL, _put("steps", lambda v: v[:2]), "steps must have 3 entries, one a parameter, got 2"),
    (ALL, _put("lrs", lambda v: v[:2]), "lrs must have 3 entries, one a parameter, got 2"),
    (ALL, _put("hyper", lambda v: v.float()), "hyper must be a contiguous Double CPU tensor of 3 x 9, got 27 elements"),
    (ALL, _put("hyper", lambda v: v[:2]), "hyper must be a contiguous Double CPU tensor of 3 x 9, got 18 elements"),
    (ALL, _put("hyper", _strided), "hyper must be a contiguous Double CPU tensor of 3 x 9, got 27 elements"),
    (ALL, _set("params", 1, lambda v: v.double()), "params[1] must be Float, BFloat16 or Half, got Double"),
    (ALL, _set("params", 1, lambda v: _strided(v)), "params[1] must be contiguous"),
    (ALL, _set("grads", 1, lambda v: v.float()), "grads[1] must be BFloat16, got Float"),
    (ALL, _set("grads", 1, lambda v: v[:2]), "grads[1] must have 21 elements, got 14"),
    (ALL, _set("grads", 1, lambda v: _strided(v)), "grads[1] must be contiguous"),
    (ALL, _set("exp_avgs", 1, lambda v: v.double()), "exp_avgs[1] must be Float, BFloat16 or Half, got Double"),
    (ALL, _set("exp_avgs", 1, lambda v: v[:2]), "exp_avgs[1] must have 21 elements, got 14"),
    (ALL, _set("exp_avgs", 1, lambda v: _strided(v)), "exp_avgs[1] must be contiguous"),
    (ALL, _set("exp_avg_sqs", 1, lambda v: v.half()), "exp_avg_sqs[1] must be Float, got Half"),
    (ALL, _set("exp_avg_sqs", 1, lambda v: v[:2]), "exp_avg_sqs[1] must have 21 elements, got 14"),
    (ALL, _set("exp_avg_sqs", 1, lambda v: _strided(v)), "exp_avg_sqs[1] must be contiguous"),
    (ALL, _set("steps", 2, lambda v: v.float()), "steps[2] must be Double, got Float"),
    (ALL, _set("steps", 2, lambda v: v.long()), "steps[2] must be Double, got Long"),
    (ALL, _set("steps", 2, torch.zeros(2).double()), "steps[2] must have 1 elements, got 2"),
    (ALL, _set("lrs", 1, lambda v: v.double()), "lrs[1] must be Float, got Double"),
    (ALL, _set("lrs", 1, torch.zeros(0)), "lrs[1] must have 1 elements, got 0"),
    (ALL, _put("grad_scale", lambda v: v.double()), "grad_scale must be Float, got Double"),
    (ALL, _put("found_inf", torch.zeros(2)), "found_inf must have 1 elements, got 2"),
    (ALL, _put("grad_norm", torch.zeros(0)), "grad_norm must have 1 elements, got 0"),
    (KEYED, _put("keys", lambda v: v[:2]), "keys must have 3 entries, one a parameter, got 2"),
    (KEYED, _row("reserve_p", 0.0), "p must be in [2**-32, 1], got 0"),
    (KEYED, _row("reserve_p", 1.5), "p must be in [2**-32, 1], got 1.5"),
    (KEYED, _row("reserve_p", math.nan), "p must be in [2**-32, 1], got nan"),
    ((D,), _put("mask_words", lambda v: v[:2]), "mask_words must have 3 entries, one a parameter, got 2"),
    ((D,), _set("mask_words", 0, lambda v: v.long()), "mask_words[0] must be Int, got Long"),
    ((D,), _set("mask_words", 0, lambda v: v.repeat(2)), "mask_words[0] must have 1 elements, got 2"),
    ((D,), _set("mask_words", 2, lambda v: index(1)), "mask_words[2] must have 0 elements, got 1"),
    ((C,), _put("indices", lambda v: v[:2]), "indices must have 3 entries, one a parameter, got 2"),
    ((C,), _set("indices", 0, index(2)), "exp_avgs[0] must have 2 elements, got 5"),
    ((C,), _set("indices", 0, index(5).long()), "indices[0] must be Int, got Long"),
    ((C,), _set("indices", 0, index(10)[::2]), "indices[0] must be contiguous"),
    ((C,), _set("indices", 0, index(6)), "indices[0] must index a tensor of fewer than 2**31 elements, got 6 for 5"),
    ((C,), _set("grads", 0, lambda v: v[:2]), "grads[0] must have 5 elements, got 2"),
    (LOW, _put("companions", lambda v: v[:2]), "companions must have 3 entries, one a parameter, got 2"),
    (LOW, _put("rounding_keys", lambda v: v[:2]), "rounding_keys must have 3 entries, one a parameter, got 2"),
    (LOW, _set("companions", 0, torch.zeros(5)), "companions[0] must have no elements for a Float weight"),
    (LOW, _set("companions", 1, lambda v: v.half()), "companions[1] must be BFloat16, got Half"),
    (LOW, _set("companions", 1, lambda v: v[:2]), "companions[1] must have 21 elements, got 14"),
    (LOW, _set("companions", 1, lambda v: _strided(v)), "companions[1] must be contiguous"),
]  # fmt: skip


@pytest.mark.parametrize(
    "op, change, message",
    [pytest.param(op, change, text, id=f"{op}-{i}") for i, (over, change, text) in enumerate(UPDATES) for op in over],
)
def test_an_update_refuses_before_it_writes(op, change, message):
    given = arguments()
    change(given)
    tensors = [t for t in tensors_of(given) if t.device.type == "cpu"]
    before = snapshot(tensors)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        getattr(KERNELS, op)(*positional(op, given))
    assert unchanged(before, tensors)


@pytest.mark.parametrize("numel, n_words", [(32, 1), (33, 2), (33, 0), (33, 1), (33, 3)])
def test_mask_words_fit_their_parameter(numel, n_words):
    given = arguments(n=1)
    given.update({name: [torch.zeros(numel)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")})
    given["mask_words"] = [torch.zeros(n_words, dtype=torch.int32)]
    if n_words in (0, (numel + 31) // 32):
        return KERNELS.adamw_masked_(*positional(D, given))
    with pytest.raises(RuntimeError, match=rf"mask_words\[0\] must have {(numel + 31) // 32} elements, got {n_words}"):
        KERNELS.adamw_masked_(*positional(D, given))


def bits(numel=8, key=1, step=1, p=0.5, domain=0, offset=0):
    return lambda: KERNELS.bernoulli_bits(numel, key, step, p, domain, offset, torch.device("cpu"))


def histogram(scores=(FLOATS,), firsts=(0,), shift=0, digits=4):
    return lambda: KERNELS.score_histogram(list(scores), list(firsts), shift, digits)


def threshold(scores=(FLOATS,), thresholds=(0.0,), tie_ends=(4,)):
    return lambda: KERNELS.threshold_bits(list(scores), list(thresholds), list(tie_ends), False)


def accumulate(accumulators, grads):
    return lambda: KERNELS.square_accumulate_(accumulators, grads, 1.0)


# The call and what the error says, or None where it is served.
OTHERS = [
    (bits(numel=0), None), (bits(step=2**32 - 1, domain=2**32 - 1, offset=4, p=2.0**-32), None), (bits(p=1.0), None),
    (bits(numel=-1), "numel must be at least 0, got -1"),
    (bits(offset=-4), "offset must be a multiple of 4 and at least 0, got -4"),
    (bits(offset=2), "offset must be a multiple of 4 and at least 0, got 2"),
    (bits(step=0), "step must be in [1, 2**32), got 0"), (bits(step=2**32), "[1, 2**32), got 4294967296"),
    (bits(domain=-1), "domain must be in [0, 2**32), got -1"), (bits(domain=2**32), "[0, 2**32), got 4294967296"),
    (bits(p=2.0**-33), "p must be in [2**-32, 1], got 1.16"), (bits(p=1.01), "p must be in [2**-32, 1], got 1.01"),
    (bits(p=math.nan), "p must be in [2**-32, 1], got nan"),
    (histogram(shift=21, digits=11, firsts=[0]), None), (histogram(shift=31, digits=1), None),
    (histogram(shift=31, digits=0), None), (histogram(firsts=[2**32 - 2**5], shift=1), None),
    (histogram(digits=12), "digits must be in [0, 11], shift in [0, 32) and their sum at most 32, got 12 and 0"),
    (histogram(digits=-1), "got -1 and 0"), (histogram(shift=-1), "got 4 and -1"),
    (histogram(shift=32, digits=0), "got 0 and 32"), (histogram(shift=30, digits=3), "got 3 and 30"),
    (histogram(firsts=[-1]), "firsts[0] must be in [0, 2**32 - 2**4], got -1"),
    (histogram(firsts=[2**32 - 2**5 + 1], shift=1), "firsts[0] must be in [0, 2**32 - 2**5], got 4294967265"),
    (histogram(firsts=[0, 0]), "firsts must have 1 entries, one a tensor, got 2"),
    (histogram([FLOATS, FLOATS.double()], [0, 0]), "scores[1] must be Float, BFloat16 or Half, got Double"),
    (histogram([FOLDED]), "scores[0] must be contiguous"),
    (threshold(tie_ends=[0]), None), (threshold(tie_ends=[2**40]), None),
    (threshold(tie_ends=[-1]), "tie_ends[0] must be at least 0, got -1"),
    (threshold(tie_ends=[4, 4]), "tie_ends must have 1 entries, one a tensor, got 2"),
    (threshold(thresholds=[]), "thresholds must have 1 entries, one a tensor, got 0"),
    (threshold([FOLDED]), "scores[0] must be contiguous"),
    (accumulate([FLOATS.clone()], [FLOATS.half()]), None),
    (accumulate([FLOATS], []), "grads must have 1 entries, got 0"),
    (accumulate([FLOATS.half()], [FLOATS]), "accumulators[0] must be Float, got Half"),
    (accumulate([FLOATS], [FLOATS.double()]), "grads[0] must be Float, BFloat16 or Half, got Double"),
    (accumulate([FLOATS], [FLOATS[1:]]), "grads[0] must have 4 elements, got 3"),
    (accumulate([FOLDED], [torch.zeros(8)]), "accumulators[0] must be contiguous"),
    (accumulate([torch.zeros(8)], [FOLDED]), "grads[0] must be contiguous"),
    (lambda: KERNELS.popcount_bits(INTS.long()), "words must be Int, got Long"),
    (lambda: KERNELS.popcount_bits(index(4)[::2]), "words must be contiguous"),
    (lambda: KERNELS.overlap_bits(INTS.long(), INTS), "a must be Int, got Long"),
    (lambda: KERNELS.overlap_bits(index(8)[::2], INTS), "a must be contiguous"),
    (lambda: KERNELS.overlap_bits(INTS, INTS.long()), "b must be Int, got Long"),
    (lambda: KERNELS.overlap_bits(INTS, INTS[1:]), "b must have 4 elements, got 3"),
]  # fmt: skip


@pytest.mark.parametrize("call, message", OTHERS, ids=[f"{i}-{text}" for i, (_, text) in enumerate(OTHERS)])
def test_the_other_ops_on_both_sides_of_every_boundary(call, message):
    if message is None:
        call()
        return
    with pytest.raises(RuntimeError, match=re.escape(message)):
        call()
