"""The benchmark command: what it records, and when it refuses."""

from __future__ import annotations

import json

import pytest
import torch

from childtune_kernels import ops
from childtune_kernels.cli import bench, main
from childtune_kernels.measure import results, shapes

CALL = ["bench", "--device", "cpu", "--model", "bert-layer", "--rounds", "2", "--repeats", "2"]


def test_a_run_records_where_what_and_the_spread(tmp_path, capsys, recwarn):
    path = tmp_path / "run.json"
    assert main([*CALL, "--only", "ours", "torch AdamW fused", "--skip", "p=0.3", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert not [str(w.message) for w in recwarn if w.category is UserWarning]
    assert "nan" not in printed and "host ms" not in printed  # a CPU has no such column
    report = json.loads(path.read_text())
    assert report["parameters"] == sum(torch.Size(shape).numel() for shape in shapes.bert_layer())
    assert {"torch", "triton", "device", "python"} <= report["machine"].keys()
    assert len(report["copy_bandwidth"]) == 2
    best = next(impl for impl in ("csrc", "reference") if ops.unavailable(impl, "cpu") is None)
    assert list(report["rows"]) == [
        "torch AdamW fused",
        f"ours ({best}), no mask",
        *(
            f"ours ({best}), D p=0.1{where}{what}"
            for where in ("", ", clustered")
            for what in ("", ", packed gradient", ", dense state")
        ),
    ]
    for name, row in results.summary(report).items():
        assert 0 < row["least"] <= row["step"] <= row["most"]
        assert ("bytes" in row) == ("D p=" not in name)
        if "bytes" in row:
            assert row["bytes"] == 28 * report["parameters"]
            assert row["share"] == pytest.approx(
                row["bytes"] / row["step"] * 1e3 / (sum(report["copy_bandwidth"]) / 2), rel=1e-12
            )


def test_an_implementation_that_differs_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(bench, "difference", lambda *a: "F: matrix differ from the reference")
    assert main([*CALL, "--only", "ours", "--impl", "reference"]) == 1
    printed = capsys.readouterr().out
    assert "refused: reference differs from the reference on cpu in float32: F: matrix differ" in printed
    assert "ours (" not in printed
