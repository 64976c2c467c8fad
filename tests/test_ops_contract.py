"""The ops as torch sees them: schemas, fakes, version counters, compilation, refusals that change nothing."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from cases import hyper_row, snapshot, unchanged

from childtune_kernels import ops, philox
from childtune_kernels.ops import reference, registry

SHAPES = ((5,), (3, 7), (0,))
LOW_PRECISION = ("companions", "rounding_keys")
# The kinds of update, and which of the lists that may be empty each has.
KINDS = {
    "plain": LOW_PRECISION,
    "bernoulli": ("mask_keys", *LOW_PRECISION),
    "masked": ("mask_words",),
    "compact": ("indices", "mask_keys", *LOW_PRECISION),
}
NAMES = [argument.name for argument in torch.ops.childtune.adamw_.default._schema.arguments]


def arguments(kind="plain", device="cpu", n=3) -> dict:
    """Valid arguments of one kind of update, by name and in the schema's order; weights of three dtypes."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    specs = list(zip(SHAPES, dtypes, strict=True))[:n]
    given = dict(
        params=[torch.randn(s, device=device).to(d) for s, d in specs],
        grads=[torch.randn(s, device=device).to(d) for s, d in specs],
        exp_avgs=[torch.zeros(s, device=device) for s, _ in specs],
        exp_avg_sqs=[torch.zeros(s, device=device) for s, _ in specs],
        steps=[torch.zeros((), dtype=torch.float64, device=device) for _ in specs],
        hyper=torch.tensor([hyper_row(i, reserve_p=0.5, decay_outside=True) for i in range(n)], dtype=torch.float64),
        indices=[torch.arange(0, device=device, dtype=torch.int32) for _ in specs],
        mask_words=[ops.pack_bits(torch.rand(s, device=device) < 0.5) for s, _ in specs],
        mask_keys=[philox.stream_key(3, str(i)) for i in range(n)],
        companions=[torch.zeros(s if d != torch.float32 else (0,), device=device) for s, d in specs],
        rounding_keys=[philox.stream_key(4, str(i)) for i in range(n)],
        lrs=[torch.tensor(0.1, device=device) for _ in specs],
        grad_scale=torch.tensor(2.0, device=device),
        found_inf=torch.tensor(0.0, device=device),
        grad_norm=torch.tensor(3.0, device=device),
    )
    assert list(given) == NAMES
    absent = set().union(*KINDS.values()) - set(KINDS[kind])
    return given | dict.fromkeys(absent, [])


def positional(given: dict) -> list:
    return [given[name] for name in NAMES]


def update_of(given: dict) -> ops.Update:
    *lists, grad_scale, found_inf, grad_norm = positional(given)
    return ops.Update(*lists, scaling=ops.Scaling(grad_scale, found_inf, grad_norm))


def tensors_of(given: dict) -> list[torch.Tensor]:
    values = [v if isinstance(v, list) else [v] for v in given.values()]
    return [t for v in values for t in v if isinstance(t, torch.Tensor) and t.layout == torch.strided]


OTHERS = {
    "gather_child_": lambda device: (
        [torch.zeros(2, device=device)],
        [torch.randn(3, 4, device=device)],
        [torch.tensor([1, 7], dtype=torch.int32, device=device)],
        True,
    ),
    "square_accumulate_": lambda device: ([torch.zeros(5, device=device)], [torch.randn(5, device=device)], 0.5),
    "fisher_linear_": lambda device: (
        torch.zeros(4, 5, device=device),
        torch.randn(2, 3, 4, device=device),
        torch.randn(2, 3, 5, device=device),
    ),
    "fisher_columns_": lambda device: (
        torch.zeros(4, device=device),
        torch.randn(2, 3, 4, device=device),
        torch.randn(2, 3, 4, device=device),
        torch.zeros(4, device=device),
    ),
    "bernoulli_bits": lambda device: (70, -(2**63), 2**24 - 1, 0.3, 0, 2**34, torch.device(device)),
    "score_histogram": lambda device: (
        [torch.randn(70, device=device), torch.zeros(3, 5, device=device).half()],
        [2**31, 0],
        20,
        11,
    ),
    "threshold_bits": lambda device: (
        [torch.randn(70, device=device), torch.zeros(3, 5, device=device).half()],
        [0.25, 0.0],
        [0, 2**40],
        True,
    ),
    "popcount_bits": lambda device: (torch.tensor([3, -1], dtype=torch.int32, device=device),),
    "overlap_bits": lambda device: tuple(torch.tensor([[3, -1], [6, 8]], dtype=torch.int32, device=device)),
}


UPDATES = [op for op in ops.OPS if ops.OPS[op].rule]
CALLS = [(op, None) for op in OTHERS] + [("adamw_", kind) for kind in KINDS]
OVERLOADS = [(*call, name) for call in CALLS for name in ("default", "csrc") if hasattr(getattr(ops, call[0]), name)]


def test_every_op_is_covered():
    assert {*UPDATES, *OTHERS} == set(ops.OPS) and "adamw_" in UPDATES
    without = {op for op in ops.OPS if not hasattr(getattr(ops, op), "csrc")}
    assert without == {"fisher_linear_", "fisher_columns_", "gather_child_"}, "products, sums, gathers are torch's own"
    for op in ops.OPS:
        assert getattr(ops, op) is getattr(torch.ops.childtune, op)


@pytest.mark.parametrize("op", ops.OPS)
def test_every_implementation_has_a_function_an_op(op, place):
    name = "update_" if ops.OPS[op].rule else op
    signatures = [inspect.signature(getattr(kernels, name)) for kernels in (place.kernels, reference)]
    assert list(signatures[0].parameters) == list(signatures[1].parameters)


@pytest.mark.parametrize("op, kind, overload", OVERLOADS)
def test_opcheck(op, kind, overload, device):
    if overload == "csrc" and (reason := ops.unavailable("csrc", device)):
        pytest.skip(reason)
    args = positional(arguments(kind, device)) if kind else list(OTHERS[op](device))
    if (op, overload) == ("bernoulli_bits", "csrc"):  # takes its result
        args = [torch.empty(3, dtype=torch.int32, device=device), *args[:-1]]
    torch.library.opcheck(getattr(getattr(torch.ops.childtune, op), overload), tuple(args))


@pytest.mark.parametrize("kind", KINDS)
def test_updates_advance_version_counters(kind, device):
    given = arguments(kind, device)
    written = [t for name in ("params", "exp_avgs", "exp_avg_sqs", "steps", "companions") for t in given[name]]
    others = [t for t in tensors_of(given) if not any(t is w for w in written)]
    versions, other_versions = [t._version for t in written], [t._version for t in others]
    ops.adamw_(*positional(given))
    assert all(t._version > version for t, version in zip(written, versions, strict=True))
    assert [t._version for t in others] == other_versions


def test_an_update_names_what_it_writes(place):
    given = arguments("compact", place.device)
    update = update_of(given)
    before = {id(t): t.clone() for t in tensors_of(given)}
    place.kernels.update_(update)
    changed = {id(t) for t in tensors_of(given) if not unchanged([before[id(t)]], [t])}
    named = {id(t) for tensors in update.written for t in tensors}
    assert changed <= named and {id(t) for t in given["steps"]} <= changed


@pytest.mark.parametrize("p", [0.0, 2.0, math.nan])
def test_without_keys_there_is_no_use_for_reserve_p(p, place):
    """F's column is neither checked nor used where F does not sample, and the table is the caller's."""
    given, other = arguments(n=2, device=place.device), arguments(n=2, device=place.device)
    for name in ("params", "grads"):
        other[name] = snapshot(given[name])
    given["hyper"][:, ops.HYPER_COLUMNS.index("reserve_p")] = p
    before = given["hyper"].clone()
    update_of(given).check()
    for own in (given, other):
        place.kernels.update_(update_of(own))
    assert unchanged(given["params"], other["params"]) and unchanged([before], [given["hyper"]])


def test_autograd_notices_an_update():
    given = arguments(n=1)
    weight = given["params"][0].requires_grad_()
    loss = (weight * weight).sum()
    with torch.no_grad():
        ops.adamw_(*positional(given))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_square_accumulate_advances_version_counters(device):
    accumulators, grads, scale = OTHERS["square_accumulate_"](device)
    version = accumulators[0]._version
    ops.square_accumulate_(accumulators, grads, scale)
    assert accumulators[0]._version > version and grads[0]._version == 0


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_update_equals_eager(kind, device):
    def update(given):
        torch.ops.childtune.adamw_(*positional(given))
        return [p * 2 for p in given["params"]]

    torch.manual_seed(1)
    eager = arguments(kind, device)
    torch.manual_seed(1)
    compiled = arguments(kind, device)
    before = snapshot(eager["params"])
    expected = update(eager)
    got = torch.compile(update, fullgraph=True, backend="aot_eager")(compiled)
    assert unchanged(expected, got)
    assert unchanged(tensors_of(eager), tensors_of(compiled))
    assert not unchanged(before, compiled["params"])


def test_compiled_bit_ops_equal_eager(device):
    def count(scores):
        accumulator = torch.zeros_like(scores)
        torch.ops.childtune.square_accumulate_([accumulator], [scores], 2.0)
        words = torch.ops.childtune.threshold_bits([accumulator], [0.25], [70])
        counts = torch.ops.childtune.score_histogram([accumulator], [0], 21, 11)
        kept = torch.ops.childtune.bernoulli_bits(70, 5, 1, 0.5, 0, 0, scores.device)
        return torch.ops.childtune.popcount_bits(words & kept), accumulator, counts

    scores = torch.randn(70, device=device)
    expected, got = count(scores), torch.compile(count, fullgraph=True, backend="aot_eager")(scores)
    assert unchanged(expected, got) and expected[0] > 0


def test_empty_lists_are_a_no_op(place):
    given = {k: [] if isinstance(v, list) else v for k, v in arguments(device=place.device).items()}
    given["hyper"] = given["hyper"][:0]
    ops.adamw_(*positional(given))
    place.kernels.update_(update_of(given))
    ops.square_accumulate_([], [], 1.0)
    ops.gather_child_([], [], [], False)
    assert ops.score_histogram([], [], 0, 4).shape == (0, 17) and ops.threshold_bits([], [], []).shape == (0,)


def _set(name, index, value):
    def change(given):
        given[name] = [*given[name]]
        given[name][index] = value(given[name][index]) if callable(value) else value

    return change


def _put(name, value):
    return lambda given: given.update({name: value(given[name]) if callable(value) else value})


def _row(column, value):
    def change(given):
        given["hyper"] = given["hyper"].clone()
        given["hyper"][1, ops.HYPER_COLUMNS.index(column)] = value

    return change


def _strided(value):
    return value.t().contiguous().t()


WIDE = torch.zeros(7, 3)
META, ZEROS = torch.zeros(3, device="meta"), torch.zeros(3)
# What is wrong, for which kinds, the change, and what the error says: argument, expected, received.
NINE = torch.arange(9, dtype=torch.int32)
ALL, F, D, C, LOW = KINDS, ("bernoulli", "compact"), ("masked",), ("compact",), ("plain", "bernoulli", "compact")
BAD = [
    ("grads-count", ALL, _put("grads", lambda v: v[:2]), "grads must have 3 entries, one a parameter, got 2"),
    ("moments-count", ALL, _put("exp_avgs", lambda v: v[:1]), "exp_avgs must have 3 entries.* got 1"),
    ("squares-count", ALL, _put("exp_avg_sqs", lambda v: v[:1]), "exp_avg_sqs must have 3 entries.* got 1"),
    ("steps-count", ALL, _put("steps", lambda v: v * 2), "steps must have 3 entries.* got 6"),
    ("lrs-count", ALL, _put("lrs", lambda v: v[:2]), "lrs must have 3 entries.* got 2"),
    ("keys-count", F, _put("mask_keys", lambda v: v[:2]), "mask_keys must have 3 entries.* got 2"),
    ("words-count", D, _put("mask_words", lambda v: v[:2]), "mask_words must have 3 entries.* got 2"),
    ("hyper-dtype", ALL, _put("hyper", lambda v: v.float()), "hyper must be a float64 CPU.* got torch.float32"),
    ("hyper-rows", ALL, _put("hyper", lambda v: v[:2]), r"hyper must be .* 3 rows.* got .*\(2, 10\)"),
    ("hyper-columns", ALL, _put("hyper", lambda v: v[:, :9]), r"hyper must be .* 10 columns.* got .*\(3, 9\)"),
    ("hyper-strides", ALL, _put("hyper", _strided), "hyper must be contiguous, got strides"),
    ("p-zero", F, _row("reserve_p", 0.0), r"reserve_p must be in \[2\*\*-32, 1\], got 0"),
    ("p-above-1", F, _row("reserve_p", 1.5), r"reserve_p must be in \[2\*\*-32, 1\], got 1.5"),
    ("p-nan", F, _row("reserve_p", math.nan), r"reserve_p must be in \[2\*\*-32, 1\], got nan"),
    ("weight-dtype", ALL, _set("params", 1, WIDE.double()), r"params\[1\] must have dtype .* got torch.float64"),
    ("weight-strides", ALL, _set("params", 1, _strided), r"params\[1\] must be contiguous, got"),
    ("grad-shape", ALL, _set("grads", 1, lambda v: v.t()), r"params\[1\] must have shape \(3, 7\), got \(7, 3\)"),
    ("grad-dtype", ALL, _set("grads", 1, lambda v: v.float()), r"params\[1\] must have dtype .*bfloat16, got .*32"),
    ("grad-sparse", ALL, _set("grads", 1, lambda v: v.to_sparse()), r"params\[1\] must be dense, got layout"),
    ("grad-complex", ALL, _set("grads", 0, lambda v: v.to(torch.complex64)), r"params\[0\] must .* got .*complex64"),
    ("grad-strides", ALL, _set("grads", 1, _strided), r"grads\[1\] must be contiguous, got"),
    ("step-dtype", ALL, _set("steps", 2, torch.zeros((), dtype=torch.int64)), "state 2: step must be .*int64"),
    ("step-numel", ALL, _set("steps", 2, torch.zeros(2).double()), "state 2: step must be one float64 on cpu, got 2 x"),
    ("moment-dtype", ALL, _set("exp_avgs", 1, lambda v: v.double()), "state 1: exp_avg must .* got .*float64"),
    ("moment-pair", ALL, _set("exp_avg_sqs", 1, lambda v: v.half()), "state 1: exp_avg_sq must .* got .*float16"),
    ("moment-shape", ALL, _set("exp_avgs", 1, WIDE), r"state 1: exp_avg must have shape \(3, 7\).* got \(7, 3\)"),
    ("moment-strides", ALL, _set("exp_avgs", 1, WIDE.t()), "state 1: exp_avg must be contiguous, got strides"),
    ("words-dtype", D, _set("mask_words", 0, lambda v: v.long()), r"mask_words\[0\] must be 1-D int32 .*int64"),
    ("words-numel", D, _set("mask_words", 0, lambda v: v.repeat(2)), r"mask_words\[0\] must hold 1 .* got 2"),
    ("indices-count", C, _put("indices", lambda v: v[:2]), "indices must have 3 entries.* got 2"),
    ("indices-dtype", C, _set("indices", 0, lambda v: v.long()), r"indices\[0\] must be contiguous 1-D int32 .*int64"),
    ("indices-numel", C, _set("indices", 0, NINE), r"indices\[0\] must index at most 5 elements, got 9"),
    ("indices-moments", C, _set("indices", 0, NINE[:2]), r"state 0: exp_avg must have shape \(2,\).* got \(5,\)"),
    ("grad-packed", C, _set("grads", 0, lambda v: v[:2]), r"gradient of params\[0\] must have shape \(5,\)"),
    ("companions-count", LOW, _put("companions", lambda v: v[:2]), "companions must have 3 entries.* got 2"),
    ("companion-fp32", LOW, _set("companions", 0, torch.zeros(5)), r"companions\[0\] must have .* dtype in \[\]"),
    ("companion-dtype", LOW, _set("companions", 1, lambda v: v.half()), r"companions\[1\] must .*, got .*float16"),
    ("companion-shape", LOW, _set("companions", 1, lambda v: v.t()), r"companions\[1\] must have shape \(3, 7\)"),
    ("rounding-count", LOW, _put("rounding_keys", lambda v: v[:2]), "rounding_keys must have 3 entries.* got 2"),
    ("lr-dtype", ALL, _set("lrs", 1, lambda v: v.double()), r"lrs\[1\] must be .* got 1 x torch.float64"),
    ("scale-dtype", ALL, _put("grad_scale", lambda v: v.double()), "grad_scale must be one float32 .*float64"),
    ("words-keys", D, _put("mask_keys", [1, 2, 3]), "mask_words must be alone, got indices, keys or companions"),
    ("words-rounding", D, _put("rounding_keys", [1, 2, 3]), "mask_words must be alone, got indices, keys or"),
    ("words-indices", D, _put("indices", [NINE[:0]] * 3), "mask_words must be alone, got indices, keys or companions"),
    ("words-companions", D, _put("companions", [ZEROS[:0]] * 3), "mask_words must be alone, got indices, keys or"),
    ("found-numel", ALL, _put("found_inf", torch.zeros(2)), "found_inf must be one float32 on cpu, got 2 x"),
]  # fmt: skip


@pytest.fixture
def no_kernels(monkeypatch):
    """Compiled kernels check too: what is refused here is refused before one is chosen."""
    monkeypatch.setattr(registry, "implementation", lambda *_: pytest.fail("a kernel was asked for"))


@pytest.mark.parametrize(
    "kind, change, message",
    [pytest.param(kind, change, message, id=f"{kind}-{name}") for name, over, change, message in BAD for kind in over],
)
def test_updates_refuse_and_change_nothing(kind, change, message, no_kernels):
    given = arguments(kind)
    change(given)
    tensors = [t for t in tensors_of(given) if t.device.type == "cpu"]
    before = snapshot(tensors)
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        ops.adamw_(*positional(given))
    assert unchanged(before, tensors)


@pytest.mark.parametrize(
    "params, changed, message",
    [
        ([ZEROS, META], {}, r"params\[1\] must have the list's device cpu, got meta"),
        ([ZEROS.int()], {}, r"params\[0\] must have dtype float32, bfloat16 or float16, got torch.int32"),
        ([ZEROS], {"grads": [META]}, r"params\[0\] must have device cpu, got meta"),
        ([ZEROS], {"exp_avgs": [META]}, "state 0: exp_avg must have .*device cpu.* got .* meta"),
        ([ZEROS], {"grad_norm": META.sum()}, "grad_norm must be one float32 on cpu, got .* meta"),
    ],
    ids=["mixed-devices", "integers", "grad-device", "state-device", "norm-device"],
)
def test_an_update_refuses_devices_and_dtypes(params, changed, message):
    """Called directly: a list with a meta tensor would be dispatched to the fake."""
    lists = {name: changed.get(name, params) for name in ("grads", "exp_avgs", "exp_avg_sqs")}
    steps = [torch.zeros((), dtype=torch.float64, device=p.device) for p in params]
    hyper = torch.tensor([hyper_row()] * len(params), dtype=torch.float64)
    with pytest.raises((RuntimeError, TypeError), match=message):
        ops.Update(
            params, *lists.values(), steps, hyper, scaling=ops.Scaling(grad_norm=changed.get("grad_norm"))
        ).check()


CPU = torch.device("cpu")
SCORES = torch.zeros(4, 6)


@pytest.mark.parametrize(
    "op, args, message",
    [
        ("square_accumulate_", ([SCORES], [], 1.0), "grads must have 1 entries, got 0"),
        ("square_accumulate_", ([SCORES.double()], [SCORES], 1.0), r"accumulators\[0\] must .*float32.* got .*float64"),
        ("square_accumulate_", ([SCORES], [SCORES.t()], 1.0), r"grads\[0\] must be a contiguous"),
        ("square_accumulate_", ([SCORES], [SCORES.view(6, 4)], 1.0), r"accumulators\[0\] must have shape \(6, 4\)"),
        ("square_accumulate_", ([SCORES], [SCORES.int()], 1.0), r"grads\[0\] must be .* got torch.int32"),
        ("bernoulli_bits", (-1, 0, 1, 0.5, 0, 0, CPU), "numel and offset must be .* got -1 and 0"),
        ("bernoulli_bits", (8, 0, 1, 0.5, 0, 2, CPU), "offset a multiple of 4, got 8 and 2"),
        ("bernoulli_bits", (8, 0, 1, 0.5, 0, -4, CPU), "offset must be at least 0 .* got 8 and -4"),
        ("bernoulli_bits", (8, 0, 0, 0.5, 0, 0, CPU), r"step must be in \[1, 2\*\*32\), got 0"),
        ("bernoulli_bits", (8, 0, 2**32, 0.5, 0, 0, CPU), r"step must be in \[1, 2\*\*32\), got 4294967296"),
        ("bernoulli_bits", (8, 0, 1, 0.0, 0, 0, CPU), r"p must be in \[2\*\*-32, 1\], got 0"),
        ("bernoulli_bits", (8, 0, 1, 1.01, 0, 0, CPU), r"p must be in \[2\*\*-32, 1\], got 1.01"),
        ("bernoulli_bits", (8, 0, 1, math.nan, 0, 0, CPU), r"p must be in \[2\*\*-32, 1\], got nan"),
        ("bernoulli_bits", (8, 0, 1, 0.5, -1, 0, CPU), r"domain must be in \[0, 2\*\*32\), got -1"),
        ("score_histogram", ([SCORES], [], 0, 4), "firsts must have 1 entries, one a tensor, got 0"),
        ("score_histogram", ([SCORES, SCORES.int()], [0, 0], 0, 4), r"scores\[1\] must be .* got torch.int32"),
        ("score_histogram", ([SCORES], [0], 0, 12), r"digits must be in \[0, 11\], .* got 12 and 0"),
        ("score_histogram", ([SCORES], [0], 29, 4), r"digits .* their sum at most 32, got 4 and 29"),
        ("score_histogram", ([SCORES], [0], -1, 4), r"shift in \[0, 32\) .* got 4 and -1"),
        ("score_histogram", ([SCORES], [2**32 - 1], 0, 1), r"firsts\[0\] must be in .* got 4294967295"),
        ("score_histogram", ([SCORES], [-1], 0, 1), r"firsts\[0\] must be in .* got -1"),
        ("threshold_bits", ([SCORES.double()], [0.5], [0]), r"scores\[0\] must be a contiguous .* got torch.float64"),
        ("threshold_bits", ([SCORES.t()], [0.5], [0]), r"scores\[0\] must be a contiguous .* got .*strides \(1, 6\)"),
        ("threshold_bits", ([SCORES], [], [0]), "thresholds must have 1 entries, one a tensor, got 0"),
        ("threshold_bits", ([SCORES], [0.5], [0, 0]), "tie_ends must have 1 entries, one a tensor, got 2"),
        ("threshold_bits", ([SCORES], [0.5], [-1]), r"tie_ends\[0\] must be at least 0, got -1"),
        ("popcount_bits", (SCORES.long(),), "words must be contiguous int32, got torch.int64"),
        ("popcount_bits", (SCORES.int().t(),), r"words must be contiguous int32, got .*strides \(1, 6\)"),
        ("overlap_bits", (SCORES, SCORES.int()), "a must be contiguous int32, got torch.float32"),
        ("overlap_bits", (SCORES.int(), SCORES.int().t()), r"b must be contiguous int32, got .*strides \(1, 6\)"),
        ("overlap_bits", (SCORES.int(), SCORES.int()[1:]), r"b must have a's shape \(4, 6\) and device cpu, got"),
    ],
)
def test_other_ops_refuse(op, args, message, no_kernels):
    with pytest.raises((RuntimeError, ValueError), match=message):
        getattr(ops, op)(*args)


def test_implementations_are_named_and_never_replaced():
    assert ops.implementation("reference", "cpu").NAME == "reference"
    assert ops.implementation("auto", "cpu").NAME == ("reference" if ops.unavailable("csrc", "cpu") else "csrc")
    with pytest.raises(ValueError, match=r"impl must be one of \('auto', .*got 'cuda'"):
        ops.implementation("cuda", "cpu")
    for name in ("csrc", "triton"):
        if reason := ops.unavailable(name, "mps"):
            with pytest.raises(RuntimeError, match=f"impl='{name}' is not available for mps tensors: "):
                ops.implementation(name, "mps")
            assert reason
