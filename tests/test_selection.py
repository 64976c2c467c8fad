"""Selection: exactly the k best scores that a stable sort of all of them puts first, and exactly k random weights."""

from __future__ import annotations

import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import BLOCK, Guards
from oracles import same_bits

from childtune_kernels import ChildMask, ops, philox, selection


def select(scores, p, **options) -> ChildMask:
    words = selection.select_words(scores, p, **options)
    return ChildMask(words, {name: tensor.shape for name, tensor in scores.items()})


SHAPES = ((0,), (1,), (31,), (32,), (33,), (BLOCK - 1,), (BLOCK,), (BLOCK + 1,), (37, 29), (), (3, 0, 2))
SHARES = (1e-9, 0.1, 1 / 3, 0.5, 0.9, 1.0)  # of none, some and all
KINDS = ("normal", "fisher", "zero", "constant", "few", "special")
if os.environ.get("TRITON_INTERPRET") == "1":  # interpreting takes 90 ms a tensor and digit, or a piece of one
    SHAPES, SHARES, KINDS = ((33,), (0,), (BLOCK + 1,)), (0.1, 1.0), ("normal", "special")
    selection._PIECES = 2
INF, NAN = math.inf, math.nan


def make_scores(place, kind="normal", dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Named scores at odd element offsets between sentinels."""
    generator, guards, scores = torch.Generator().manual_seed(4), Guards(), {}
    for i, shape in enumerate(SHAPES):
        values = {
            "normal": lambda shape: torch.randn(shape, generator=generator),
            "fisher": lambda shape: (torch.randn(shape, generator=generator) * 1e-6) ** 2,
            "zero": torch.zeros,
            "constant": lambda shape: torch.full(shape, -3.5),
            "few": lambda shape: torch.randint(-2, 3, shape, generator=generator).float(),
            "special": lambda shape: torch.tensor([0.0, -0.0, INF, -INF, 1e-42, -1e-42, 1.0])[
                torch.randint(0, 7, shape, generator=generator)
            ],
        }[kind](shape)
        scores[f"p{i}"] = guards.place(values.to(dtype).to(place.device), i % 4)
    return scores


def sorted_bits(scores, p, lowest=False) -> torch.Tensor:
    """Return the bits of all tensors by a stable sort of their concatenation."""
    flat = torch.cat([tensor.reshape(-1).cpu().double() for tensor in scores.values()]) + 0.0
    order = torch.sort(flat, stable=True, descending=not lowest).indices
    return torch.zeros(len(flat), dtype=torch.bool).index_fill_(0, order[: round(p * len(flat))], True)


def bits_of(mask, names) -> torch.Tensor:
    return torch.cat([mask.to_dense(name).reshape(-1).cpu() for name in names])


@pytest.mark.parametrize("lowest", [False, True], ids=["highest", "lowest"])
@pytest.mark.parametrize("kind", KINDS)
def test_select_equals_a_stable_sort(kind, lowest, dtype, place):
    scores = make_scores(place, kind, dtype)
    before = {name: tensor.clone() for name, tensor in scores.items()}
    for p in SHARES:
        mask = select(scores, p, lowest=lowest, impl=place.impl)
        assert list(mask) == list(scores) and all(mask.shape(name) == scores[name].shape for name in scores)
        assert torch.equal(bits_of(mask, scores), sorted_bits(scores, p, lowest)), p
    assert all(same_bits(scores[name], before[name]) for name in scores)


@pytest.mark.parametrize("kind", ["normal", "few"])
def test_select_per_tensor(kind, place):
    scores = make_scores(place, kind)
    for p in SHARES:
        mask = select(scores, p, per_tensor=True, impl=place.impl)
        for name, tensor in scores.items():
            assert torch.equal(bits_of(mask, [name]), sorted_bits({name: tensor}, p)), (name, p)


def test_ties_go_to_the_first_in_mapping_order_then_by_index(place):
    """Every k around the boundaries of tensors whose scores are all equal."""
    scores = {name: torch.full((n,), 2.0, device=place.device) for name, n in (("z", 40), ("a", 3), ("m", 70))}
    scores["m"][60] = 5.0  # one above the ties
    counts = (0, 1, 2, 41, 42, 44, 45, 112, 113)
    for k in counts if place.impl != "triton" else counts[1:-1:3]:
        for lowest in (False, True):
            mask = select(scores, max(k / 113, 1e-9), lowest=lowest, impl=place.impl)
            assert mask.count() == k and torch.equal(bits_of(mask, scores), sorted_bits(scores, k / 113, lowest)), k


def test_the_last_tie_is_found_inside_a_large_tensor(place):
    if place.impl == "triton" and place.device == "cpu":
        pytest.skip("256 programs a look")
    scores = {"a": torch.zeros(9, device=place.device), "b": torch.zeros(300_007, device=place.device)}
    scores["b"][1::3] = 1.0
    for p in (0.1, 0.6, 0.99999):
        mask = select(scores, p, impl=place.impl)
        assert torch.equal(bits_of(mask, scores), sorted_bits(scores, p)), p


@pytest.mark.parametrize("p", [0.1, 0.37, 0.5])
def test_highest_and_lowest_are_disjoint(p, place):
    """Of distinct scores: among equal ones both take the first."""
    order = torch.randperm(2001, generator=torch.Generator().manual_seed(5))
    scores = {"a": order[:900].float().to(place.device), "b": order[900:].float().to(place.device)}
    highest, lowest = (bits_of(select(scores, p, lowest=x, impl=place.impl), scores) for x in (False, True))
    assert not (highest & lowest).any() and highest.sum() == lowest.sum() == round(p * 2001)


def test_tensors_that_are_not_contiguous_or_need_gradients(place):
    scores = {"a": torch.randn(33, 20, device=place.device).t(), "b": torch.randn(50, device=place.device)[::2]}
    scores["c"] = torch.randn(5, device=place.device, requires_grad=True)
    mask = select(scores, 0.25, impl=place.impl)
    detached = {name: tensor.detach() for name, tensor in scores.items()}
    assert torch.equal(bits_of(mask, scores), sorted_bits(detached, 0.25))


def test_the_named_implementation_counts_and_packs(place):
    """By default csrc does where it is built, for GPUs too; a named one is never replaced."""
    scores = {"a": torch.zeros(3, device=place.device)}
    (part,) = selection._Scores(scores, place.impl).parts
    assert part[0].NAME == place.impl
    (part,) = selection._Scores(scores, "auto").parts
    built = ops.unavailable("csrc", place.device) is None
    assert part[0].NAME == ("csrc" if built else ops.implementation("auto", place.device).NAME)


@pytest.mark.parametrize("built", [True, False])
def test_csrc_is_asked_for_where_it_is_built(built, monkeypatch):
    """Not what is fastest for everything else; only by default, and only where there is one."""
    asked, scores, own = [], {"a": torch.arange(9.0)}, ops.implementation

    def implementation(name, device_type):
        asked.append(name)
        return own("reference", device_type)

    monkeypatch.setattr(ops, "implementation", implementation)
    monkeypatch.setattr(ops, "unavailable", lambda name, device: None if built or name == "reference" else "not built")
    for impl in ("auto", "reference", "triton"):
        assert select(scores, 1 / 3, impl=impl).to_dense("a").tolist() == [False] * 6 + [True] * 3
    assert asked == ["csrc" if built else "auto", "reference", "triton"]


def test_a_cpu_has_csrc_before_an_interpreter(monkeypatch):
    """Where every implementation could serve: Triton's kernels are interpreted on a CPU, a thousand times slower."""
    pytest.importorskip("triton")
    monkeypatch.setattr(ops.registry, "unavailable", lambda name, device_type: None)
    choose = ops.implementation.__wrapped__
    assert [choose("auto", device).NAME for device in ("cpu", "cuda")] == ["csrc", "triton"]
    monkeypatch.setattr(
        ops.registry, "unavailable", lambda name, device_type: None if name == "reference" else "not built"
    )
    assert {choose("auto", device).NAME for device in ("cpu", "cuda", "xpu")} == {"reference"}


@pytest.mark.gpu
def test_scores_on_several_devices():
    generator = torch.Generator().manual_seed(6)
    scores = {f"p{i}": torch.randint(-9, 9, (501,), generator=generator).float() for i in range(5)}
    spread = {name: tensor.to("cuda" if i % 2 else "cpu") for i, (name, tensor) in enumerate(scores.items())}
    for p in (0.1, 0.5):
        assert torch.equal(bits_of(select(spread, p), scores), sorted_bits(scores, p))


def test_counts_beyond_32_bits():
    """Every score counted 2**33 times, as the histograms of a model of 10**13 weights would."""
    scores = torch.tensor([3.0, 1.0, 1.0, -2.0, 7.0])
    many = 2**33

    def histogram(firsts, shift, digits, *, together):
        counts = ops.score_histogram([scores], firsts.tolist(), shift, digits)
        return counts.numpy() * many

    lists = SimpleNamespace(digits=11, histogram=histogram)
    group = np.zeros(1, np.int64)
    for wanted, expected, taken, ties in (
        (1, 7, 1, 1),
        (many + 1, 3, 1, 1),
        (3 * many, 1, many, 2),
        (5 * many, -2, many, 1),
    ):
        found = selection._find_keys(lists, group, np.array([wanted]), lowest=False)
        assert ops.score_of_key(int(found[0][0])) == expected
        assert (found[1][0], found[2][0]) == (taken, ties * many)


@pytest.mark.parametrize("row", [0, -1])
def test_a_nan_is_refused_by_name(row, dtype, place):
    scores = make_scores(place, dtype=dtype)
    name = next(name for name, tensor in scores.items() if tensor.numel() > 100)
    for nan in (NAN, -NAN):
        scores[name].view(-1)[row] = nan
        for per_tensor in (False, True):
            with pytest.raises(
                ValueError, match=rf"scores\['{name}'\] must not be NaN, got 1 of {scores[name].numel()}"
            ):
                select(scores, 0.1, per_tensor=per_tensor, impl=place.impl)


@pytest.mark.parametrize("p", [0, -0.1, 1.0001, NAN, INF])
def test_a_share_out_of_range_is_refused(p):
    for choose in (lambda: select({"a": torch.zeros(3)}, p), lambda: ChildMask.random({"a": (3,)}, p, 0)):
        with pytest.raises(ValueError, match=rf"p must be in \(0, 1\], got {p}"):
            choose()


@pytest.mark.parametrize(
    "scores, error, message",
    [
        ({}, ValueError, "scores must name at least one tensor, got none"),
        (
            {"a": torch.zeros(2), "b": torch.zeros(2).long()},
            TypeError,
            r"scores\['b'\] must have dtype .* got torch.int64",
        ),
        ({"a": torch.zeros(2).double()}, TypeError, r"scores\['a'\] must have dtype .* got torch.float64"),
        ({"a": torch.zeros(2, 2).to_sparse()}, TypeError, r"scores\['a'\] must be dense, got layout torch.sparse_coo"),
    ],
    ids=["empty", "integers", "fp64", "sparse"],
)
def test_bad_scores_are_refused(scores, error, message):
    with pytest.raises(error, match=message):
        select(scores, 0.5)


def test_keys_are_in_the_order_of_the_scores():
    scores = torch.tensor([-INF, -3e38, -1.0, -1e-38, -1e-45, -0.0, 0.0, 1e-45, 1e-38, 1.0, 3e38, INF])
    keys = ops.reference.score_keys(scores)
    assert (keys.diff() > 0).sum() == 10 and keys[5] == keys[6] and keys.min() >= 0 and keys.max() < 2**32
    assert [ops.score_of_key(key) for key in keys.tolist()] == scores.tolist()
    assert math.isnan(ops.score_of_key(2**32 - 1)) and math.isnan(ops.score_of_key(0))


@pytest.mark.parametrize("digits", [0, 1, 4, 5])
def test_score_histogram(digits, dtype, place):
    """Every implementation serves every width, at ranges that start anywhere."""
    scores = list(make_scores(place, "special", dtype).values()) + list(make_scores(place, "normal", dtype).values())
    scores[-1].view(-1)[:3] = NAN
    for shift in (32 - max(digits, 1), 20):
        last = 2**32 - 2 ** (shift + digits)
        firsts = [min(last, 0x3F123456 * (i % 4)) for i in range(len(scores))]
        counts = place.kernels.score_histogram(scores, firsts, shift, digits)
        assert counts.dtype == torch.int64 and counts.shape == (len(scores), 2**digits + 1)
        for tensor, first, row in zip(scores, firsts, counts.tolist(), strict=True):
            values = tensor.reshape(-1).float().cpu()
            keys = ops.reference.score_keys(values[~values.isnan()]).tolist()
            expected = [sum((key - first) >> shift == d for key in keys) for d in range(2**digits)]
            assert row == [*expected, int(values.isnan().sum())]
        last_alone = place.kernels.score_histogram(scores[-1:], firsts[-1:], shift, digits)
        assert torch.equal(last_alone, counts[-1:])


def random_words(shapes, seed) -> torch.Tensor:
    """Return the words of all elements, one after another, from the specification of the stream."""
    words = []
    for name, shape in shapes.items():
        elements = torch.arange(math.prod(shape))
        key = (seed ^ philox.uid(name)) & (2**64 - 1)
        counter = (elements >> 2, elements * 0, elements * 0 + 1, elements * 0 + 3)
        drawn = torch.stack(philox.philox4x32_10(counter, (key & 0xFFFFFFFF, key >> 32)), dim=1)
        words.append(drawn.gather(1, (elements & 3)[:, None])[:, 0] if len(elements) else elements)
    return torch.cat(words)


NAMED = {"w": (60, 53), "bias": (), "none": (0,), "a": (777,)}


@pytest.mark.parametrize("p", [1e-9, 0.0004, 0.1, 0.5, 0.999, 1.0])
def test_random_child_is_the_lowest_words(p, place):
    words = random_words(NAMED, 7)
    mask = ChildMask.random(NAMED, p, 7, device=place.device, impl=place.impl)
    order = torch.sort(words, stable=True).indices[: round(p * len(words))]
    assert torch.equal(bits_of(mask, NAMED), torch.zeros(len(words), dtype=torch.bool).index_fill_(0, order, True))


def test_random_child_per_tensor(place):
    mask = ChildMask.random(NAMED, 0.25, 2**64 - 1, per_tensor=True, device=place.device, impl=place.impl)
    assert [mask.count(name) for name in NAMED] == [round(0.25 * math.prod(shape)) for shape in NAMED.values()]
    other = ChildMask.random(NAMED, 0.25, 3, per_tensor=True, device=place.device, impl=place.impl)
    assert mask != other


@pytest.mark.parametrize("shift", [28, 0], ids=["far-apart", "neighbours"])
def test_random_child_of_equal_words(shift, monkeypatch):
    """Words of 4 bits only: the last included word is shared by many, and the first of them are taken."""
    words = dict(zip(NAMED, random_words(NAMED, 1).split([math.prod(s) for s in NAMED.values()]), strict=True))
    coarse = {philox.stream_key(1, name): own >> 28 << shift for name, own in words.items()}

    def bernoulli_bits(numel, key, step, p, domain, offset, device):
        assert (step, domain, offset, numel) == (1, philox.RANDOM_CHILD, 0, len(coarse[key]))
        return ops.pack_bits(coarse[key] < p * 2**32)

    kernels = SimpleNamespace(bernoulli_bits=bernoulli_bits, popcount_bits=ops.reference.popcount_bits)
    monkeypatch.setattr(selection.ops, "implementation", lambda impl, device: kernels)
    flat = torch.cat(list(coarse.values()))
    for k in (1, 100, 777, 2500, len(flat) - 1):
        order = torch.sort(flat, stable=True).indices[:k]
        expected = torch.zeros(len(flat), dtype=torch.bool).index_fill_(0, order, True)
        assert torch.equal(bits_of(ChildMask.random(NAMED, k / len(flat), 1), NAMED), expected), k


def test_random_child_refuses():
    with pytest.raises(ValueError, match="shapes must name at least one tensor, got none"):
        ChildMask.random({}, 0.5, 0)
    with pytest.raises(ValueError, match="seed must be an integer"):
        ChildMask.random({"a": (3,)}, 0.5, -1)
