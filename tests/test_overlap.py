"""`childtune overlap`: its tables, files and pictures, and what bad input is told."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from childtune_kernels import ChildMask, jaccard_matrix
from childtune_kernels.cli import main, plots

pytest.importorskip("safetensors")  # GPU machines may run the tests without an installation
Figure = pytest.importorskip("matplotlib.figure").Figure

SHAPES = {"embed.weight": (7, 5), "layers.0.w": (8, 9), "layers.0.b": (9,), "layers.10.w": (8, 9), "layers.10.b": (9,)}


def make(density: float, seed: int) -> ChildMask:
    generator = torch.Generator().manual_seed(seed)
    return ChildMask.from_dense({n: torch.rand(shape, generator=generator) < density for n, shape in SHAPES.items()})


MASKS = {"rte": make(0.3, 0), "mrpc": make(0.5, 1), "cola": make(0.1, 2)}


@pytest.fixture
def files(tmp_path) -> list[str]:
    for label, mask in MASKS.items():
        mask.save(tmp_path / f"{label}.safetensors")
    return [str(tmp_path / f"{label}.safetensors") for label in MASKS]


def cells(out: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| ")]


def test_tables(files, capsys):
    assert main(["overlap", *files]) == 0
    rows = cells(capsys.readouterr().out)
    sizes, overlaps = rows[2:5], rows[5:]
    for row, (label, mask) in zip(sizes, MASKS.items(), strict=True):
        assert row == [label, "5", f"{mask.count()}", f"{mask.density():.4f}", mask.digest()]
    assert overlaps[0] == ["Jaccard", *MASKS]
    for row, (label, a) in zip(overlaps[2:], MASKS.items(), strict=True):
        assert row == [label, *(f"{a.jaccard(b):.4f}" for b in MASKS.values())]


def test_per_tensor(files, capsys):
    assert main(["overlap", *files[:2], "--per-tensor"]) == 0
    rows = cells(capsys.readouterr().out)[-len(SHAPES) :]
    a, b = MASKS["rte"], MASKS["mrpc"]
    for row, name in zip(rows, SHAPES, strict=True):
        assert row == [name, *(f"{value:.4f}" for value in (a.density(name), b.density(name), a.jaccard(b, name)))]
    assert main(["overlap", files[0], "--per-tensor"]) == 0
    assert "mean Jaccard" not in capsys.readouterr().out


def test_files(files, tmp_path, capsys):
    numbers, picture, densities = (tmp_path / name for name in ("x.json", "x.png", "y.png"))
    flags = ["--json", str(numbers), "--plot", str(picture), "--density-plot", str(densities)]
    assert main(["overlap", *files, *flags, "--per-tensor"]) == 0
    found = json.loads(numbers.read_text())
    assert found["jaccard"] == jaccard_matrix(list(MASKS.values())).tolist()
    assert [(m["label"], m["file"]) for m in found["masks"]] == list(zip(MASKS, files, strict=True))
    assert [m["digest"] for m in found["masks"]] == [mask.digest() for mask in MASKS.values()]
    rte, mrpc, cola = MASKS.values()
    expected = [a.jaccard(b, "layers.0.w") for a, b in ((rte, mrpc), (rte, cola), (mrpc, cola))]
    assert found["per_tensor"]["layers.0.w"]["jaccard"] == expected
    assert picture.read_bytes().startswith(b"\x89PNG") and densities.read_bytes().startswith(b"\x89PNG")


def test_masks_of_the_same_file_name_are_told_apart(files, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    MASKS["cola"].save(tmp_path / "other" / "rte.safetensors")
    assert main(["overlap", files[0], str(tmp_path / "other" / "rte.safetensors")]) == 0
    assert cells(capsys.readouterr().out)[4][0] == "Jaccard"


def test_bad_input_is_told_in_one_line(files, tmp_path, capsys):
    (tmp_path / "text.safetensors").write_text("hello")
    del (bits := {name: MASKS["rte"].to_dense(name) for name in SHAPES})["embed.weight"]
    ChildMask.from_dense(bits).save(tmp_path / "less.safetensors")
    bad = {
        "none.safetensors": "No such file or directory: ",
        "text.safetensors": "text.safetensors must hold childtune_kernels.ChildMask version 1 or 2, got a header of ",
        "less.safetensors": "less.safetensors must be of the same model as ",
        "rte.safetensors": "each file must be given once, got ",
    }
    for name, message in bad.items():
        assert main(["overlap", files[0], str(tmp_path / name)]) == 2
        out, err = capsys.readouterr()
        assert not out and message in err and err.startswith("childtune overlap: ") and len(err.splitlines()) == 1
    assert main(["overlap", files[0], str(tmp_path / "less.safetensors")]) == 2
    assert "'embed.weight' (expected (7, 5), got none)" in capsys.readouterr().err


def test_plots_say_what_they_need(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    for flag in ("--plot", "--density-plot"):
        assert main(["overlap", *files, flag, str(tmp_path / "x.png")]) == 1
        assert "plots need matplotlib: pip install 'childtune_kernels[demo]'" in capsys.readouterr().err
    assert main(["overlap", *files]) == 0


def test_names_give_layers_and_kinds():
    names = {
        "bert.encoder.layer.11.output.dense.weight": ("bert.encoder.layer.*.output.dense.weight", 11),
        "h.0.attn.1.weight": ("h.*.attn.1.weight", 0),
        "0.weight": ("*.weight", 0),
        "fc1.weight": ("fc1.weight", None),
        "blocks.3": ("blocks.*", 3),
    }
    assert plots.layers_and_kinds(names) == names


def test_density_table():
    mask = MASKS["rte"]
    table, kinds, layers = plots.density_table(mask, SHAPES)
    assert (kinds, layers) == (["embed.weight", "layers.*.w", "layers.*.b"], [None, 0, 10])
    nan = float("nan")
    expected = [[mask.density("embed.weight"), nan, nan]]
    expected += [[nan, *(mask.density(f"layers.{layer}.{kind}") for layer in (0, 10))] for kind in "wb"]
    assert torch.equal(table.nan_to_num(-1), torch.tensor(expected, dtype=torch.float64).nan_to_num(-1))


def test_heat_map_prints_labels_and_values(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    plots.jaccard_heat_map(torch.tensor([[1.0, 0.25], [0.25, 1.0]]), ["rte", "mrpc"], tmp_path / "x.png")
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["rte", "mrpc"]
    assert [text.get_text() for text in axes.texts] == ["1.00", "0.25", "0.25", "1.00"]


def test_panels_share_their_kinds_whatever_the_order_of_names(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    mask = MASKS["rte"]
    other = ChildMask.from_dense({name: mask.to_dense(name) for name in reversed(SHAPES)})
    plots.density_by_layer({"a": mask, "b": other}, tmp_path / "x.png")
    first, second, _ = drawn[0].axes
    assert (first.get_title(), second.get_title()) == ("a", "b")
    assert [label.get_text() for label in first.get_yticklabels()] == ["embed.weight", "layers.*.w", "layers.*.b"]
    pictures = [axes.images[0].get_array().filled(-1).tolist() for axes in (first, second)]
    assert pictures[0] == pictures[1] == plots.density_table(mask, SHAPES)[0].nan_to_num(-1).tolist()
