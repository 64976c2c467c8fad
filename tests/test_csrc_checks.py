"""What csrc refuses itself: whatever would make a plain pointer reach beyond its memory. Meaning: test_checks.py."""

from __future__ import annotations

import re

import pytest
import torch
from cases import hyper_row, snapshot, unchanged

from childtune_kernels import ops

if reason := ops.unavailable("csrc", "cpu"):
    pytest.skip(reason, allow_module_level=True)
KERNELS = ops.implementation("csrc", "cpu")
FLOATS, INTS = torch.zeros(4), torch.zeros(4, dtype=torch.int32)
FOLDED = torch.zeros(2, 4).t()
SHAPES, DTYPES = ((5,), (3, 7), (0,)), (torch.float32, torch.bfloat16, torch.float16)
PLAIN, F, D, C = ("plain", "F", "dense D", "packed D")
ALL, LOW = (PLAIN, F, D, C), (PLAIN, F, C)


def index(n: int, **kwargs) -> torch.Tensor:
    return torch.arange(n, **{"dtype": torch.int32, **kwargs})


def arguments(kind: str) -> dict:
    """Valid arguments of the compiled `adamw_`, in the schema's order; packed D with nothing but whole tensors."""
    like = [torch.randn(shape).to(dtype) for shape, dtype in zip(SHAPES, DTYPES, strict=True)]
    keys = [3, 2**63 - 1, -(2**63)]
    return dict(
        params=like,
        grads=snapshot(like),
        exp_avgs=[torch.zeros(shape) for shape in SHAPES],
        exp_avg_sqs=[torch.zeros(shape) for shape in SHAPES],
        steps=[torch.zeros((), dtype=torch.float64) for _ in SHAPES],
        hyper=torch.tensor([hyper_row(i, reserve_p=0.5) for i in range(3)], dtype=torch.float64),
        indices=[index(0) for _ in SHAPES] if kind == C else [],
        mask_words=[ops.pack_bits(torch.rand(shape) < 0.5) for shape in SHAPES] if kind == D else [],
        mask_keys=keys if kind in (F, C) else [],
        companions=[torch.zeros(shape if i else 0) for i, shape in enumerate(SHAPES)] if kind in LOW else [],
        rounding_keys=keys if kind in LOW else [],
        lrs=[torch.tensor(0.1) for _ in SHAPES],
        grad_scale=torch.tensor(2.0),
        found_inf=torch.tensor(0.0),
        grad_norm=torch.tensor(3.0),
    )


def put(name: str, value):
    """Replace an argument, by a function of itself or as it is."""
    return lambda given: given.update({name: value(given[name]) if callable(value) else value})


def entry(name: str, i: int, value):
    """Replace an entry of a list likewise."""
    return put(name, lambda own: [(value(x) if callable(value) else value) if j == i else x for j, x in enumerate(own)])


def strided(value: torch.Tensor) -> torch.Tensor:
    return value.t().contiguous().t()


def without_memory(value: torch.Tensor) -> torch.Tensor:
    value = value.clone()
    value.untyped_storage().resize_(0)
    return value


def fewer(name: str):
    return put(name, lambda own: own[:2]), f"{name} must have 3 entries, one a parameter, got 2"


TABLE = f"hyper must be a contiguous Double CPU tensor of 3 x {len(ops.HYPER_COLUMNS)}, got "
CELLS = 3 * len(ops.HYPER_COLUMNS)
GIVEN_BACK = "must have memory, got a storage that was given back"
# For which kinds of update, the change, and what the error says. Weights: float32 (5,), bfloat16 (3, 7), float16 (0,).
UPDATES = [
    *[(ALL, *fewer(name)) for name in ("grads", "exp_avgs", "exp_avg_sqs", "steps", "lrs")],
    *[(LOW, *fewer(name)) for name in ("companions", "rounding_keys")],
    ((F, C), *fewer("mask_keys")), ((D,), *fewer("mask_words")), ((C,), *fewer("indices")),
    (ALL, put("hyper", lambda v: v.float()), f"{TABLE}{CELLS} elements of Float"),
    (ALL, put("hyper", lambda v: v[:2]), f"{TABLE}{CELLS * 2 // 3} elements of Double"),
    (ALL, put("hyper", lambda v: v[:, :-1].clone()), f"{TABLE}{CELLS - 3} elements of Double"),
    (ALL, put("hyper", strided), f"{TABLE}{CELLS} elements of Double"),
    (ALL, entry("params", 1, lambda v: v.double()), "params[1] must be Float, BFloat16 or Half, got Double"),
    (ALL, entry("params", 1, strided), "params[1] must be contiguous"),
    (ALL, entry("grads", 1, lambda v: v.float()), "grads[1] must be BFloat16, got Float"),
    (ALL, entry("grads", 1, lambda v: v[:2]), "grads[1] must have 21 elements, got 14"),
    (ALL, entry("grads", 1, strided), "grads[1] must be contiguous"),
    (ALL, entry("exp_avgs", 1, lambda v: v.double()), "exp_avgs[1] must be Float, BFloat16 or Half, got Double"),
    (ALL, entry("exp_avgs", 1, lambda v: v[:2]), "exp_avgs[1] must have 21 elements, got 14"),
    (ALL, entry("exp_avgs", 1, strided), "exp_avgs[1] must be contiguous"),
    (ALL, entry("exp_avg_sqs", 1, lambda v: v.half()), "exp_avg_sqs[1] must be Float, got Half"),
    (ALL, entry("exp_avg_sqs", 1, lambda v: v[:2]), "exp_avg_sqs[1] must have 21 elements, got 14"),
    (ALL, entry("exp_avg_sqs", 1, strided), "exp_avg_sqs[1] must be contiguous"),
    (ALL, entry("steps", 2, lambda v: v.float()), "steps[2] must be Double, got Float"),
    (ALL, entry("steps", 2, lambda v: v.long()), "steps[2] must be Double, got Long"),
    (ALL, entry("steps", 2, torch.zeros(2).double()), "steps[2] must have 1 elements, got 2"),
    (ALL, entry("lrs", 1, lambda v: v.double()), "lrs[1] must be Float, got Double"),
    (ALL, entry("lrs", 1, torch.zeros(0)), "lrs[1] must have 1 elements, got 0"),
    (ALL, put("grad_scale", lambda v: v.double()), "grad_scale must be Float, got Double"),
    (ALL, put("found_inf", torch.zeros(2)), "found_inf must have 1 elements, got 2"),
    (ALL, put("grad_norm", torch.zeros(0)), "grad_norm must have 1 elements, got 0"),
    *[(ALL, entry(name, 1, without_memory), f"{name}[1] {GIVEN_BACK}")
      for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps", "lrs")],
    (LOW, entry("companions", 1, without_memory), f"companions[1] {GIVEN_BACK}"),
    ((D,), entry("mask_words", 1, without_memory), f"mask_words[1] {GIVEN_BACK}"),
    (ALL, put("grad_norm", without_memory), f"grad_norm {GIVEN_BACK}"),
    (ALL, put("hyper", without_memory), f"hyper {GIVEN_BACK}"),
    ((D,), entry("mask_words", 0, lambda v: v.long()), "mask_words[0] must be Int, got Long"),
    ((D,), entry("mask_words", 0, lambda v: v.repeat(2)), "mask_words[0] must have 1 elements, got 2"),
    ((D,), entry("mask_words", 2, index(1)), "mask_words[2] must have 0 elements, got 1"),
    ((C,), entry("indices", 0, index(2)), "exp_avgs[0] must have 2 elements, got 5"),
    ((C,), entry("indices", 0, index(5).long()), "indices[0] must be Int, got Long"),
    ((C,), entry("indices", 0, index(10)[::2]), "indices[0] must be contiguous"),
    ((C,), entry("indices", 0, index(6)), "indices[0] must index a tensor of fewer than 2**31 elements, got 6 for 5"),
    ((C,), entry("grads", 0, lambda v: v[:2]), "grads[0] must have 5 elements, got 2"),
    (LOW, entry("companions", 0, torch.zeros(5)), "companions[0] must have no elements for a Float weight"),
    (LOW, entry("companions", 1, lambda v: v.half()), "companions[1] must be BFloat16, got Half"),
    (LOW, entry("companions", 1, lambda v: v[:2]), "companions[1] must have 21 elements, got 14"),
    (LOW, entry("companions", 1, strided), "companions[1] must be contiguous"),
]  # fmt: skip


@pytest.mark.parametrize(
    "kind, change, message",
    [
        pytest.param(kind, change, text, id=f"{kind}-{i}-{text}")
        for i, (over, change, text) in enumerate(UPDATES)
        for kind in over
    ],
)
def test_an_update_refuses_before_it_writes(kind, change, message):
    given = arguments(kind)
    change(given)
    tensors = [t for v in given.values() for t in (v if isinstance(v, list) else [v]) if isinstance(t, torch.Tensor)]
    tensors = [t for t in tensors if not t.numel() or t.data_ptr()]
    before = snapshot(tensors)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.childtune.adamw_.csrc(*given.values())
    assert unchanged(before, tensors)


@pytest.mark.parametrize("kind", ALL)
def test_these_arguments_are_served_unchanged(kind):
    """The table of refusals would prove nothing if they were not."""
    given = arguments(kind)
    before = snapshot(given["params"])
    torch.ops.childtune.adamw_.csrc(*given.values())
    assert not unchanged(before, given["params"])


@pytest.mark.parametrize("numel, n_words", [(32, 1), (33, 2), (33, 0), (33, 1), (33, 3)])
def test_mask_words_fit_their_parameter(numel, n_words):
    given = arguments(PLAIN)
    given.update({name: [torch.zeros(numel)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")})
    given.update(steps=given["steps"][:1], hyper=given["hyper"][:1], companions=[], rounding_keys=[], lrs=[])
    given["mask_words"] = [torch.zeros(n_words, dtype=torch.int32)]
    if n_words in (0, (numel + 31) // 32):
        return torch.ops.childtune.adamw_.csrc(*given.values())
    with pytest.raises(RuntimeError, match=rf"mask_words\[0\] must have {(numel + 31) // 32} elements, got {n_words}"):
        torch.ops.childtune.adamw_.csrc(*given.values())


def test_the_packed_child_of_nothing_has_no_memory():
    """A parameter outside the child has neither indices nor moments: nothing of it is read or written."""
    given = arguments(C)
    for name in ("exp_avgs", "exp_avg_sqs", "companions"):
        given[name] = [torch.zeros(0) for _ in SHAPES]
    before = snapshot(given["params"])
    torch.ops.childtune.adamw_.csrc(*given.values())
    assert unchanged(before, given["params"])


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
    (lambda: torch.ops.childtune.bernoulli_bits.csrc(INTS.clone(), 96, 1, 1, 0.5, 0, 0),
     "words must have 3 elements, got 4"),
    (lambda: torch.ops.childtune.bernoulli_bits.csrc(INTS.long(), 128, 1, 1, 0.5, 0, 0), "words must be Int, got Long"),
    (lambda: torch.ops.childtune.bernoulli_bits.csrc(index(8)[::2], 128, 1, 1, 0.5, 0, 0), "words must be contiguous"),
    (histogram(shift=21, digits=11, firsts=[0]), None), (histogram(shift=31, digits=1), None),
    (histogram(shift=31, digits=0), None), (histogram(firsts=[2**32 - 2**5], shift=1), None),
    (histogram(digits=12), "digits must be in [0, 11], shift in [0, 32) and their sum at most 32, got 12 and 0"),
    (histogram(digits=-1), "got -1 and 0"), (histogram(shift=-1), "got 4 and -1"),
    (histogram(shift=32, digits=0), "got 0 and 32"), (histogram(shift=30, digits=3), "got 3 and 30"),
    (histogram(firsts=[0, 0]), "firsts must have 1 entries, one a tensor, got 2"),
    (histogram([FLOATS, FLOATS.double()], [0, 0]), "scores[1] must be Float, BFloat16 or Half, got Double"),
    (histogram([FOLDED]), "scores[0] must be contiguous"),
    (threshold(tie_ends=[0]), None), (threshold(tie_ends=[2**40]), None),
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
    (accumulate([without_memory(FLOATS)], [FLOATS]), f"accumulators[0] {GIVEN_BACK}"),
    (accumulate([FLOATS], [without_memory(FLOATS)]), f"grads[0] {GIVEN_BACK}"),
    (threshold([without_memory(FLOATS)]), f"scores[0] {GIVEN_BACK}"),
    (lambda: KERNELS.popcount_bits(without_memory(INTS)), f"words {GIVEN_BACK}"),
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
