"""ChildMask: packing, counting, files."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from childtune_kernels import ChildMask, ops


def dense(density=0.3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = {"embed.weight": (37, 29), "norm.bias": (31,), "scale": (), "empty": (0, 3), "head.weight": (2, 32)}
    return {name: torch.rand(shape, generator=generator) < density for name, shape in shapes.items()}


@pytest.fixture
def mask() -> ChildMask:
    return ChildMask.from_dense(dense())


def test_dense_round_trip(device):
    bits = {name: b.to(device) for name, b in dense().items()}
    mask = ChildMask.from_dense(bits)
    assert list(mask) == list(bits) and len(mask) == 5 and "scale" in mask and "other" not in mask
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


def test_file_round_trip(mask, tmp_path):
    path = tmp_path / "child.pt"
    mask.save(path)
    loaded = ChildMask.load(str(path))
    assert loaded == mask and list(loaded) == list(mask) and loaded.shape("embed.weight") == (37, 29)
    ChildMask.from_dense(dense(0.9)).save(path)
    assert ChildMask.load(path) == ChildMask.from_dense(dense(0.9))
    assert [p.name for p in tmp_path.iterdir()] == ["child.pt"], "no partial file stays"


@pytest.mark.gpu
def test_a_cuda_mask_is_saved_for_any_machine(tmp_path):
    bits = {name: b.cuda() for name, b in dense().items()}
    ChildMask.from_dense(bits).save(tmp_path / "child.pt")
    loaded = ChildMask.load(tmp_path / "child.pt")
    assert loaded.words("scale").device.type == "cpu" and loaded == ChildMask.from_dense(bits)


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {"weight": torch.zeros(2)},
        {"format": "childtune_kernels.ChildMask", "version": 2, "shapes": {}, "words": {}},
        {"format": "other", "version": 1, "shapes": {}, "words": {}},
    ],
    ids=["list", "state-dict", "version", "format"],
)
def test_foreign_files_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="x.pt must hold childtune_kernels.ChildMask version 1, got "):
        ChildMask.load(tmp_path / "x.pt")


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
        ({"a": torch.zeros(1, dtype=torch.int32)}, {"b": (3,)}, r"name the same parameters, got \['a', 'b'\]"),
        ({"a": torch.zeros(1, dtype=torch.int64)}, {"a": (3,)}, r"words\['a'\] must be int32 .* got torch.int64"),
        ({"a": torch.zeros(2, dtype=torch.int32)}, {"a": (3,)}, r"of shape \(1,\), got torch.int32 of shape \(2,\)"),
        ({"a": torch.zeros(1, dtype=torch.int32)}, {"a": (3, 11)}, r"of shape \(2,\), got torch.int32 of shape \(1,\)"),
    ],
    ids=["names", "dtype", "too-many", "too-few"],
)
def test_words_must_fit_their_shapes(words, shapes, message):
    with pytest.raises(ValueError, match=message):
        ChildMask(words, shapes)
