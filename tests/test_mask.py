"""ChildMask: packing, counting, sets, overlaps, pruning."""

from __future__ import annotations

import copy
import operator
import pickle

import pytest
import torch

from childtune_kernels import ChildAdamW, ChildMask, jaccard_matrix, ops


def dense(density=0.3, seed=4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (37, 29), "norm.bias": (31,), "scale": (), "empty": (0, 3), "head.weight": (2, 32)}
    return {name: torch.rand(shape, generator=generator) < density for name, shape in shapes.items()}


@pytest.fixture
def mask() -> ChildMask:
    return ChildMask.from_dense(dense())


def test_dense_round_trip(device):
    bits = {name: b.to(device) for name, b in dense().items()}
    mask = ChildMask.from_dense(bits)
    assert list(mask) == list(bits) and len(mask) == 5 and "scale" in mask and "other" not in mask and 0 not in mask
    for name, expected in bits.items():
        got = mask.to_dense(name)
        assert got.dtype == torch.bool and got.device.type == device
        assert torch.equal(got, expected) and mask.shape(name) == expected.shape


def test_words_are_row_major_whatever_the_strides():
    bits = dense()["embed.weight"]
    transposed = ChildMask.from_dense({"w": bits.t()})
    assert torch.equal(transposed.to_dense("w"), bits.t())
    assert torch.equal(transposed.words("w"), ops.pack_bits(bits.t().contiguous()))


def test_counts_and_densities(mask):
    bits = dense()
    total, kept = sum(b.numel() for b in bits.values()), sum(int(b.sum()) for b in bits.values())
    assert mask.count() == kept and mask.density() == kept / total
    for name, b in bits.items():
        assert mask.count(name) == int(b.sum())
        assert mask.density(name) == (int(b.sum()) / b.numel() if b.numel() else 0.0)
    assert ChildMask({}, {}).density() == 0.0
    assert f"{kept:,} weights" in repr(mask) and "5 parameters" in repr(mask)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_all_or_nothing(density):
    mask = ChildMask.from_dense(dense(density * 2 - 0.5))
    assert mask.density() == density and mask.count() == density * sum(b.numel() for b in dense().values())


def test_equality(mask):
    assert mask == ChildMask.from_dense(dense()) == copy.deepcopy(mask) == pickle.loads(pickle.dumps(mask))
    flipped = dense()
    flipped["head.weight"][1, 3] ^= True
    assert mask != ChildMask.from_dense(flipped)
    assert mask != ChildMask.from_dense({name: b for name, b in dense().items() if name != "scale"})
    assert mask != ChildMask.from_dense({**dense(), "norm.bias": dense()["norm.bias"].view(1, 31)})
    assert mask != "mask"


@pytest.mark.parametrize("method", ["to_dense", "words", "shape", "count", "density"])
def test_unknown_names_are_refused(mask, method):
    with pytest.raises(KeyError, match="the mask names no parameter 'pooler'; it names 5"):
        getattr(mask, method)("pooler")


@pytest.mark.parametrize(
    "bits", [torch.ones(3), torch.ones(3, dtype=torch.uint8), [True]], ids=["fp32", "uint8", "list"]
)
def test_only_bools_are_packed(bits):
    with pytest.raises(TypeError, match="mask of 'w' must be a bool tensor, got "):
        ChildMask.from_dense({"w": bits})


@pytest.mark.parametrize(
    "words, shapes, message",
    [
        ({"a": torch.zeros(1, dtype=torch.int32)}, {"b": (3,)}, r"name the same parameters, got 'a', 'b' in one only"),
        ({"a": torch.zeros(1, dtype=torch.int64)}, {"a": (3,)}, r"words\['a'\] must be int32 .* got torch.int64"),
        ({"a": torch.zeros(2, dtype=torch.int32)}, {"a": (3,)}, r"of shape \(1,\), got torch.int32 of shape \(2,\)"),
        ({"a": torch.zeros(1, dtype=torch.int32)}, {"a": (3, 11)}, r"of shape \(2,\), got torch.int32 of shape \(1,\)"),
        (
            {"a": torch.full((1,), 8, dtype=torch.int32)},
            {"a": (3,)},
            "spare bits 0 after each parameter's last element",
        ),
    ],
    ids=["names", "dtype", "too-many", "too-few", "spare-bits"],
)
def test_words_must_fit_their_shapes(words, shapes, message):
    with pytest.raises(ValueError, match=message):
        ChildMask(words, shapes)


def backwards(bits: dict) -> dict:
    return dict(reversed(bits.items()))


def joined(bits: dict) -> torch.Tensor:
    return torch.cat([bits[name].flatten() for name in sorted(bits)])


def test_words_start_at_16_byte_boundaries(mask, device):
    mask = mask.to(device)
    for name in mask:
        assert mask.words(name).data_ptr() % 16 == 0 or not mask.words(name).numel()
        assert torch.equal(mask.words(name).cpu(), ops.pack_bits(dense()[name]))


SETS = {"|": operator.or_, "&": operator.and_, "^": operator.xor, "-": lambda a, b: a & ~b}


@pytest.mark.parametrize("symbol", SETS)
def test_set_algebra(symbol, mask, device):
    """The second mask names the same parameters in another order."""
    other = dense(0.6, seed=5)
    got = eval(f"a {symbol} b", {"a": mask.to(device), "b": ChildMask.from_dense(backwards(other)).to(device)})
    expected = {name: SETS[symbol](bits, other[name]) for name, bits in dense().items()}
    assert got == ChildMask.from_dense(expected) and got.device.type == device and list(got) == list(mask)
    assert mask == ChildMask.from_dense(dense()), "an operand was written"


def test_complement(mask, device):
    got = ~mask.to(device)
    assert got == ChildMask.from_dense({name: ~bits for name, bits in dense().items()}) and ~got == mask
    assert got.count() + mask.count() == sum(bits.numel() for bits in dense().values())
    assert (mask & got).count() == 0 and (mask | got).density() == 1.0
    assert ~ChildMask({}, {}) == ChildMask({}, {})


@pytest.mark.parametrize("numel", [0, 1, 31, 32, 33, 63, 64, 96, 127, 128, 129, 160])
def test_complement_of_nothing_is_everything(numel):
    """At every number of spare bits and of padding words."""
    nothing = ChildMask.from_dense({name: torch.zeros(numel, dtype=torch.bool) for name in "ab"})
    assert (~nothing).count() == 2 * numel and (~nothing).count("a") == numel
    assert ~nothing == ChildMask.from_dense({name: torch.ones(numel, dtype=torch.bool) for name in "ab"})


def test_masks_of_different_models_do_not_mix(mask):
    small = ChildMask.from_dense(
        {"scale": torch.tensor(True), "other": torch.ones(3) > 0, "norm.bias": torch.ones(30) > 0}
    )
    message = (
        "the other mask must have this mask's parameters, of these shapes; 5 differ: "
        r"'embed.weight' \(expected \(37, 29\), got none\), 'norm.bias' \(expected \(31,\), got \(30,\)\), "
        r".*'other' \(expected none, got \(3,\)\)"
    )
    algebra = (operator.or_, operator.and_, operator.xor, operator.sub)
    for operation in (*algebra, ChildMask.jaccard, lambda a, b: jaccard_matrix([a, b])):
        with pytest.raises(ValueError, match=message):
            operation(mask, small)
    for operation in algebra:
        with pytest.raises(TypeError, match="unsupported operand"):
            operation(mask, {"scale"})
    many = ChildMask.from_dense({f"p{i:02}": torch.ones(1) > 0 for i in range(15)})
    with pytest.raises(ValueError, match=r"15 differ: .*'p09' \(expected \(1,\), got none\) and 5 more$"):
        many | ChildMask({}, {})


def test_jaccard(mask, device):
    a, b = joined(dense()), joined(dense(0.6, seed=5))
    other = ChildMask.from_dense(backwards(dense(0.6, seed=5)))
    assert mask.to(device).jaccard(other) == int((a & b).sum()) / int((a | b).sum())
    for name, bits in dense().items():
        both, either = ((op(bits, dense(0.6, seed=5)[name])).sum() for op in (operator.and_, operator.or_))
        assert mask.to(device).jaccard(other, name) == (int(both) / int(either) if either else 1.0)
    assert mask.jaccard(mask) == 1.0 and mask.jaccard(~mask) == 0.0
    assert (mask - mask).jaccard(mask - mask) == 1.0, "two empty children are equal"
    assert (mask - mask).jaccard(mask) == 0.0


def test_jaccard_matrix(mask, device):
    masks = [mask.to(device), ChildMask.from_dense(dense(0.6, seed=5)), ~mask, mask - mask]
    matrix = jaccard_matrix(masks)
    assert matrix.dtype == torch.float64 and matrix.device.type == "cpu"
    assert matrix.tolist() == [[a.jaccard(b) for b in masks] for a in masks]
    assert jaccard_matrix([]).shape == (0, 0) and jaccard_matrix([mask]).tolist() == [[1.0]]


def test_moving_a_mask(mask, device):
    moved = mask.to(device)
    assert moved == mask and moved.device.type == device and moved.to("cpu") == mask
    assert mask.to("cpu").words("norm.bias").data_ptr() == mask.words("norm.bias").data_ptr()


def test_digest_names_the_mask(mask, device):
    digest = mask.digest()
    assert len(digest) == 32 and int(digest, 16)
    assert digest == ChildMask.from_dense(backwards(dense())).to(device).digest() == copy.deepcopy(mask).digest()
    flipped, named, shaped = dense(), dense(), dense()
    flipped["head.weight"][1, 31] ^= True
    named["head.bias"] = named.pop("head.weight")
    shaped["norm.bias"] = shaped["norm.bias"].view(1, 31)
    others = [ChildMask.from_dense(bits).digest() for bits in (flipped, named, shaped)]
    assert len({digest, *others}) == 4
    words = {"a": torch.tensor([5], dtype=torch.int32)}
    assert ChildMask(words, {"a": (3,)}).digest() == "8d053eb6c33669b7d154a6dd596076ed", (
        "other machines and versions must agree"
    )


class Model(torch.nn.Module):
    """Has the mask's parameters, a head that it does not name, and a tied one."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = torch.nn.Embedding(37, 29), torch.nn.LayerNorm(29), torch.nn.Linear(29, 37)
        self.head.weight = self.embed.weight

    def mask(self, names=("norm.bias", "head.weight")) -> ChildMask:
        return ChildMask.from_dense({name: torch.rand(self.get_parameter(name).shape) < 0.4 for name in names})


def test_prune_zeroes_what_is_outside_the_child(device):
    model = Model().to(device)
    mask = model.mask()
    with torch.no_grad():
        model.norm.bias.fill_(-2.0)
        model.embed.weight[3, :20] = float("nan")
    before = {name: param.detach().clone() for name, param in model.named_parameters(remove_duplicate=False)}
    mask.prune(model)
    for name, param in model.named_parameters(remove_duplicate=False):
        tied = "head.weight" if name == "embed.weight" else name
        inside = mask.to_dense(tied).to(device) if tied in mask else torch.ones_like(param, dtype=torch.bool)
        assert torch.equal(param[inside].nan_to_num(9.0), before[name][inside].nan_to_num(9.0))
        assert (param[~inside] == 0).all() and not param[~inside].signbit().any()
    assert (model.norm.bias == 0).any() and (model.head.bias != 0).any() and model.norm.bias.requires_grad


def test_a_pruned_model_stays_pruned():
    model = Model()
    mask = model.mask(("norm.bias",))
    mask.prune(model)
    optimizer = ChildAdamW(model.named_parameters(), lr=0.1, weight_decay=0.1, decay="all", mask=mask)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert torch.equal(model.norm.bias != 0, mask.to_dense("norm.bias"))


def test_a_mask_for_another_model_is_refused_before_anything_is_touched():
    model = Model()
    before = [param.detach().clone() for param in model.parameters()]
    strange = {"norm.bias": (29,), "head.weight": (29, 37), "pooler": (3,)}
    mask = ChildMask.from_dense({name: torch.zeros(shape, dtype=torch.bool) for name, shape in strange.items()})
    for refuse in (mask.check, mask.prune):
        with pytest.raises(ValueError) as error:
            refuse(model)
        assert str(error.value) == (
            "the model must have this mask's parameters, of these shapes; 2 differ: "
            "'head.weight' (expected (29, 37), got (37, 29)), 'pooler' (expected (3,), got none)"
        )
    assert all(map(torch.equal, before, model.parameters()))
    assert model.mask().check(model) is None


# ---- names of wrapped models ---------------------------------------------------------------------------------------


WRAPPED = {
    "compiled": "_orig_mod.{}",
    "data parallel": "module.{}",
    "both": "module._orig_mod.{}",
    "twice": "module.module.{}",
}


@pytest.mark.parametrize("wrapped", WRAPPED.values(), ids=WRAPPED)
def test_a_mask_of_a_wrapped_model_is_the_bare_models(wrapped, mask, tmp_path):
    bits = {wrapped.format(name): b for name, b in dense().items()}
    other = ChildMask.from_dense(bits)
    assert other == mask and list(other) == list(mask) and other.digest() == mask.digest()
    for name, expected in dense().items():
        for held in (mask, other):
            assert wrapped.format(name) in held and name in held
            assert torch.equal(held.to_dense(wrapped.format(name)), expected)
            assert torch.equal(held.words(wrapped.format(name)), mask.words(name))
            assert held.shape(wrapped.format(name)) == expected.shape
            assert held.count(wrapped.format(name)) == int(expected.sum())
            assert held.density(wrapped.format(name)) == mask.density(name)
            assert held.jaccard(~mask, wrapped.format(name)) == mask.jaccard(~mask, name)
    other.save(tmp_path / "x")
    assert ChildMask.load(tmp_path / "x") == mask


def test_names_that_become_one_are_refused():
    with pytest.raises(ValueError, match="'a.w' more than once"):
        ChildMask.from_dense({"a._orig_mod.w": torch.ones(1) > 0, "a.w": torch.ones(1) > 0})


def wrap(model):
    wrapped = torch.nn.Module()
    wrapped.module = model
    return wrapped


@pytest.mark.parametrize("shell", [lambda m: m, wrap, torch.compile, lambda m: wrap(torch.compile(m))])
def test_wrapped_models_are_drawn_for_checked_and_pruned_as_the_bare_one(shell):
    model = Model()
    mask = ChildMask.random(shell(model), 0.3, 7)
    assert mask == ChildMask.random(Model(), 0.3, 7)
    assert mask == ChildMask.random({n: p.shape for n, p in shell(model).named_parameters()}, 0.3, 7)
    mask.check(shell(model))
    mask.prune(shell(model))
    for name in mask:
        assert (model.get_parameter(name)[~mask.to_dense(name)] == 0).all()
    with pytest.raises(ValueError, match="'norm.bias' "):
        ChildMask.from_dense({"norm.bias": torch.ones(3) > 0}).check(shell(model))


class Outer(torch.nn.Module):
    """A bare model with a part called `module`, and parameters beside it, some of the same names as in it."""

    def __init__(self, *beside):
        super().__init__()
        self.module = torch.nn.Linear(4, 3)
        for name in beside:
            setattr(self, name, torch.nn.Parameter(torch.ones(4 if name == "other" else (3, 4))))


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("given", ["module.weight", "weight"])
@pytest.mark.parametrize("beside", [["other"], ["other", "weight"], ["other", "weight2"]])
def test_a_part_called_module(beside, given, saved, tmp_path):
    """Only the model tells whether `module.` is DistributedDataParallel's; what can be either is refused."""
    mask, model = ChildMask.from_dense({given: torch.zeros(3, 4) > 0}), Outer(*beside)
    if saved:
        mask.save(tmp_path / "x")
        mask = ChildMask.load(tmp_path / "x")
    if given == "module.weight" and "weight" in beside:
        for use in (mask.check, mask.prune, lambda m: mask.fitted(dict(m.named_parameters()))):
            with pytest.raises(ValueError, match="'weight', which it has both as they are and behind 'module.'"):
                use(model)
        assert (model.module.weight != 0).any() and (model.weight != 0).any()
    elif given == "weight" and "weight" not in beside:
        with pytest.raises(ValueError, match="'weight'"):
            mask.check(model)
    else:
        fitted = mask.fitted(dict(model.named_parameters()))
        assert list(fitted) == [given] and fitted == mask and fitted.digest() == mask.digest()
        assert torch.equal(fitted.to_dense(given), mask.to_dense(given))
        other = "weight" if given == "module.weight" else "module.weight"
        assert other not in fitted or other not in dict(model.named_parameters())
        mask.check(model)
        mask.prune(model)
        for name, param in model.named_parameters():
            assert (name == given) == bool((param == 0).all()), name
        fitted.save(tmp_path / "y")
        assert list(ChildMask.load(tmp_path / "y").fitted(dict(model.named_parameters()))) == [given]


def test_fitting_lists_unknown_names_and_what_to_pass(mask):
    assert mask.fitted([*mask, "more"]) == mask and list(ChildMask({}, {}).fitted([])) == []
    many = ChildMask.from_dense({f"p{i:02}": torch.ones(1) > 0 for i in range(12)})
    with pytest.raises(ValueError, match=r"got 'p01', .*'p10' and 1 more beside them; pass .*: 'a', 'p00'$"):
        many.fitted(["p00", "a"])
    fitted = many.fitted([*many, "module.p00"])
    assert "module.p00" not in fitted and "module.p01" in fitted and "module.p00" in many
    with pytest.raises(KeyError, match="'module.p00'; it names 12: 'p00', .*'p09' and 2 more"):
        fitted.words("module.p00")


@pytest.mark.parametrize("shape", [(), (1,), (32,), (33,), (5, 13), (160,)])
@pytest.mark.parametrize("extra", [-1, 1, 4])
def test_too_few_or_too_many_words_are_refused(shape, extra, device):
    expected = (torch.Size(shape).numel() + 31) // 32
    words = torch.zeros(expected + extra, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=rf"words\['b'\] must be int32 of shape \({expected},\)"):
        ChildMask({"a": words[:1].new_zeros(1), "b": words}, {"a": (3,), "b": shape})
    with pytest.raises(ValueError, match="must be int32 of shape"):
        ChildMask({"b": words.new_zeros(1, expected)}, {"b": shape})


@pytest.mark.parametrize("numel", [1, 31, 33, 63, 160 - 1])
def test_spare_bits_are_refused_in_any_parameter(numel, device):
    for bit in range(numel % 32, 32):
        words = torch.zeros((numel + 31) // 32, dtype=torch.int32, device=device)
        words[-1] = torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
        full = torch.full((1,), -1, dtype=torch.int32, device=device)
        with pytest.raises(ValueError, match="spare bits 0"):
            ChildMask({"full": full, "w": words}, {"full": (32,), "w": (numel,)})


def test_negative_sizes_are_refused():
    with pytest.raises(ValueError, match=r"shapes\['a'\] must have no negative size, got \(-3, -4\)"):
        ChildMask({"a": torch.zeros(1, dtype=torch.int32)}, {"a": (-3, -4)})


def test_any_strides_are_packed(device):
    whole = torch.rand(12, 35, 2, device=device) < 0.4
    for bits in (
        whole[::2],
        whole[:, 3:20],
        whole[..., 1],
        whole.transpose(0, 2),
        whole[:1].expand(5, 35, 2),
        whole.flip(0),
    ):
        assert torch.equal(ChildMask.from_dense({"w": bits}).to_dense("w"), bits)


def test_density_of_nothing():
    mask = ChildMask.from_dense({"a": torch.ones(0, 3) > 0})
    assert mask.density() == mask.density("a") == 0.0 and mask.count() == 0 and mask.jaccard(mask) == 1.0


def test_a_mask_shares_no_memory_with_what_it_was_made_of():
    words = {"a": torch.zeros(4, dtype=torch.int32)}
    mask = ChildMask(words, {"a": (128,)})
    words["a"].fill_(-1)
    assert mask.count() == 0
