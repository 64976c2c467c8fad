"""`childtune demo`: end to end on a tiny budget, and what bad flags are told."""

import importlib.util
import json

import pytest
import torch

from childtune_kernels.cli import demo, main
from childtune_kernels.experiments.digits import Protocol
from childtune_kernels.experiments.training import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = Protocol(pretrain_steps=5, steps=5, learning_rates=(1e-3, 1e-2), tuning_seeds=1, evaluations=2)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(demo, "PROTOCOL", QUICK)


def test_demo_prints_one_table_and_writes_its_files(quick, tmp_path, capsys):
    numbers, picture = tmp_path / "demo.json", tmp_path / "demo.png"
    assert main(["demo", "--seeds", "2", "--device", "cpu", "--json", str(numbers), "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    results = json.loads(numbers.read_text())
    rows = [line for line in out.splitlines() if line.startswith("|")][2:]
    assert [row.split("|")[1].strip() for row in rows] == list(METHODS.values())
    for row, scores in zip(rows, results["methods"].values(), strict=True):
        assert len(scores["accuracy"]) == 2
        assert [curve[-1] for curve in scores["curves"]] == scores["accuracy"]
        assert f"| {sum(scores['accuracy']) / 2:.1f} ± " in row
        assert scores["lr"] == float(max(scores["validation"], key=scores["validation"].get))
    assert "the best of 0.001, 0.01 on 200 validation images" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_demo_of_one_method_compares_nothing(quick, capsys):
    assert main(["demo", "--seeds", "1", "--methods", "F", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "Child-Tuning_F" in out and "vanilla AdamW" not in out and "Child-Tuning_D" not in out
    assert "nothing follows" in out


def test_methods_are_named_as_people_type_them():
    assert demo._methods("D") == ("D",) and demo._methods("Vanilla, f,d ") == ("vanilla", "F", "D")


def test_demo_names_missing_packages(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["demo"]) == 1
    assert "sklearn, scipy, tqdm: pip install 'childtune_kernels[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "0"], "--seeds: expected a whole number of at least 1, got '0'"),
        (["--seeds", "2.5"], "--seeds: expected a whole number of at least 1, got '2.5'"),
        (["--methods", "vanilla,E"], "--methods: expected some of vanilla,F,D, each once, got 'vanilla,E'"),
        (["--methods", "F,F"], "--methods: expected some of vanilla,F,D, each once, got 'F,F'"),
        (["--methods", ""], "--methods: expected some of vanilla,F,D, each once, got ''"),
        (["--device", "tpu"], "--device: expected auto, cpu or cuda, got 'tpu'"),
        (["--plot", "curves.txt"], "--plot: expected a .png file in a folder that exists, got 'curves.txt'"),
        (["--json", "no/such/folder/x.json"], "--json: expected a .json file in a folder that exists"),
    ],
)
def test_demo_says_what_a_flag_expects(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", *flags])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_demo_refuses_an_absent_gpu(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--device", "cuda"])
    assert "torch sees no CUDA device" in capsys.readouterr().err
