"""ChildMask's files: what they hold, how they are aligned, what is refused, what a kill leaves."""

from __future__ import annotations

import json
import os

import pytest
import torch
from test_mask import backwards, dense

from childtune_kernels import ChildMask, files

safetensors = pytest.importorskip("safetensors.torch")  # GPU machines may run the tests without an installation


@pytest.fixture
def mask() -> ChildMask:
    return ChildMask.from_dense(dense())


def contents(path) -> tuple[dict, dict]:
    """Return a file's tensors, as they lie in a memory map of it, and its metadata."""
    with safetensors.safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


def test_round_trip(mask, tmp_path, device):
    path = tmp_path / "child.safetensors"
    mask.to(device).save(path)
    loaded = ChildMask.load(str(path))
    assert loaded == mask and list(loaded) == list(mask) and loaded.shape("embed.weight") == (37, 29)
    assert loaded.device.type == "cpu" and ChildMask.load(path, device=device).device.type == device
    ChildMask.from_dense(dense(0.9)).save(path)
    assert ChildMask.load(path) == ChildMask.from_dense(dense(0.9))
    ChildMask({}, {}).save(path)
    assert ChildMask.load(path) == ChildMask({}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["child.safetensors"], "no partial file stays"


def test_what_a_file_holds(mask, tmp_path):
    """The format, for readers without this package: bytes by numpy's little bit order."""
    mask.save(tmp_path / "x.safetensors")
    tensors, metadata = contents(tmp_path / "x.safetensors")
    assert metadata.keys() == {"format", "version", "shapes", "digest", "prefix", "file_digest"}
    assert (metadata["format"], metadata["version"]) == ("childtune_kernels.ChildMask", "2")
    assert metadata["digest"] == mask.digest()
    assert json.loads(metadata["shapes"]) == {name: list(bits.shape) for name, bits in dense().items()}
    for name, bits in dense().items():
        assert tensors[name].dtype == torch.uint8 and tensors[name].numel() % 16 == 0
        assert tensors[name].numel() - (bits.numel() + 7) // 8 < 16
        unpacked = [byte >> i & 1 for byte in tensors[name].tolist() for i in range(8)]
        assert unpacked[: bits.numel()] == bits.flatten().int().tolist() and not any(unpacked[bits.numel() :])


@pytest.mark.parametrize("length", range(0, 40, 3))
def test_tensors_are_aligned_in_a_memory_map(length, tmp_path):
    """Whatever the length of the header, which safetensors pads to 8 bytes."""
    names = ("a" * length + "1", '\u00e9"2', "norm.bias")
    ChildMask.from_dense({n: torch.ones(31 + 40 * i) > 0 for i, n in enumerate(names)}).save(tmp_path / "x")
    assert set(contents(tmp_path / "x")[0]) == set(names)
    for tensor in contents(tmp_path / "x")[0].values():
        assert tensor.numel() and tensor.data_ptr() % 16 == 0


def test_a_kill_leaves_the_old_file(mask, tmp_path, monkeypatch):
    path = tmp_path / "child.safetensors"
    mask.save(path)

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        (~mask).save(path)
    assert ChildMask.load(path) == mask


def _changed(metadata=(), **tensors):
    """Rewrite a file in another way, and with a digest of its own: what is wrong with it is seen without."""

    def change(path):
        old, about = contents(path)
        about = {**about, **dict(metadata)}
        del about["file_digest"]
        kept = {n: t for n, t in {**old, **tensors}.items() if t is not None}
        files.write(path, about.pop("format"), about.pop("version"), about, kept)

    return change


def _flip(name, byte, bit):
    def change(path):
        tensor = contents(path)[0][name].clone()
        tensor[byte] ^= 1 << bit
        _changed(**{name: tensor})(path)

    return change


BYTES = torch.zeros(16, dtype=torch.uint8)
BAD = {
    "not safetensors": (lambda path: path.write_text("hello"), "got a header of .* bytes in a file of 5"),
    "old pickles": (lambda path: torch.save({"words": {}}, path), "got a header of"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "got tensors of .* bytes in a file with"),
    "other weights": (lambda path: safetensors.save_file({"w": torch.ones(3)}, path), "got None version None"),
    "format": (_changed({"format": "other"}), "got other version 2"),
    "version": (_changed({"version": "3"}), "got childtune_kernels.ChildMask version 3"),
    "no shapes": (_changed({"shapes": ""}), "got JSONDecodeError: Expecting value"),
    "shapes of another kind": (_changed({"shapes": "[]"}), "got AttributeError"),
    "deep shapes": (_changed({"shapes": "[" * 100_000}), "got RecursionError"),
    "other names": (_changed(scale=None, other=BYTES), "got shapes and tensors of different names: 'other', 'scale'"),
    "size": (_changed(scale=BYTES[:8]), r"got torch.uint8 of shape \(8,\) for 'scale' of 1 elements"),
    "dtype": (_changed(scale=BYTES.int()), r"got torch.int32 of shape \(16,\) for 'scale' of 1 elements"),
    "a bit": (_flip("embed.weight", 100, 3), "got bits of digest [0-9a-f]{32} where [0-9a-f]{32} was written"),
    "digest": (_changed({"digest": "0" * 32}), "got bits of digest [0-9a-f]{32} where 0{32} was written"),
    "spare bit": (_flip("norm.bias", 3, 7), "got words must have spare bits 0"),
    "padding bit": (_flip("norm.bias", 15, 7), "got set bits after the last element of 'norm.bias'"),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_bad_files_are_refused(change, message, mask, tmp_path):
    path = tmp_path / "x.safetensors"
    mask.save(path)
    change(path)
    with pytest.raises(
        ValueError, match=f"x.safetensors must hold childtune_kernels.ChildMask version 1 or 2, {message}"
    ):
        ChildMask.load(path)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        ChildMask.load(tmp_path / "none.safetensors")


def test_equal_masks_have_equal_bits_in_files(mask, tmp_path):
    mask.save(tmp_path / "a")
    ChildMask.from_dense(backwards(dense())).save(tmp_path / "b")
    (a, about_a), (b, about_b) = (contents(tmp_path / name) for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert about_a["digest"] == about_b["digest"]
