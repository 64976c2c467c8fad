"""`childtune delta` on safetensors files."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from childtune_kernels.cli import main


@pytest.fixture
def models(tmp_path):
    base = {"w": torch.arange(300.0), "v": torch.zeros(4)}
    tuned = {"w": torch.arange(300.0), "v": torch.ones(4), "head": torch.ones(2, 2)}
    tuned["w"][::50] = -1
    folder = tmp_path / "base"
    folder.mkdir()
    save_file(base, folder / "model.safetensors", {"format": "pt"})
    save_file(tuned, tmp_path / "tuned.safetensors", {"format": "pt"})
    return tmp_path, base, tuned


def delta(*args) -> int:
    return main(["delta", *map(str, args)])


def same(path, expected) -> bool:
    found = load_file(path)
    return found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)


def test_there_and_back(models, capsys):
    folder, base, tuned = models
    file, out, back = (folder / f"{n}.safetensors" for n in ("delta", "out", "back"))
    assert delta("make", folder / "base", folder / "tuned.safetensors", "-o", file) == 0
    assert "6 values in 1 tensors, 2 whole tensors of 8, 1 of them new" in capsys.readouterr().out
    assert delta("apply", folder / "base", file, "-o", out) == 0 and same(out, tuned)
    assert delta("revert", out, file, folder / "base", "-o", back) == 0 and same(back, base)
    assert delta("info", file) == 0
    text = capsys.readouterr().out
    assert "w: 6 of 300 values" in text and "head: new 4 values" in text and "v: all 4 values" in text


def test_what_cannot_be_done_is_one_line_and_writes_nothing(models, capsys):
    folder, _, _ = models
    file, out = folder / "delta.safetensors", folder / "out.safetensors"
    delta("make", folder / "base", folder / "tuned.safetensors", "-o", file)
    (folder / "empty").mkdir()
    for args, message in (
        (("apply", folder / "tuned.safetensors", file), "the base of this delta"),
        (("apply", folder / "base", folder / "tuned.safetensors"), "must hold childtune_kernels.ChildDelta"),
        (("make", folder / "empty", folder / "base"), "must hold model.safetensors, a single file"),
        (("make", folder / "absent.safetensors", folder / "base"), "absent.safetensors"),
        (("revert", folder / "base", file, folder / "base"), "as this delta made it"),
    ):
        capsys.readouterr()
        assert delta(*args, "-o", out) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
        assert not out.exists()
