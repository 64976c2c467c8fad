"""What is written of a measurement: an optimizer's row, and the file and exit code of a benchmark's script."""

from __future__ import annotations

import inspect
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from childtune_kernels import ChildAdamW, ChildMask
from childtune_kernels.measure import results

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPTS = sorted(
    path.name for path in BENCHMARKS.glob("bench_*.py") if path.name != "bench_step.py"
)  # that is pytest's


def script(monkeypatch, tmp_path, measure, *words, **options) -> tuple[int, dict]:
    """Run `results.main` as a script would; return its exit code and what it wrote."""
    path = tmp_path / "new folder" / "run.json"
    monkeypatch.setattr(sys, "argv", ["bench_x.py", *(word if word != "RESULT" else str(path) for word in words)])
    return results.main("A script.", measure, device="cpu", **options), json.loads(path.read_text())


def test_a_script_writes_when_where_and_all_its_parts(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CHILDTUNE_COMMIT", "abc")

    def measure():
        yield {"weights": 3, "rows": {"a": 1}, "list": [1]}
        yield {"rows": {"b": 2}, "list": [2]}

    code, report = script(monkeypatch, tmp_path, measure, "RESULT")
    assert (code, report["commit"], report["machine"]["torch"]) == (0, "abc", torch.__version__)
    assert len(report["date"]) == 10
    assert (report["weights"], report["rows"], report["list"]) == (3, {"a": 1, "b": 2}, [1, 2])
    assert '"b": 2' in capsys.readouterr().out


def test_parts_are_written_before_the_next_is_measured(monkeypatch, tmp_path):
    def measure():
        yield {"first": 1}
        raise MemoryError("of the second")

    with pytest.raises(MemoryError):
        script(monkeypatch, tmp_path, measure, "RESULT")
    assert json.loads((tmp_path / "new folder" / "run.json").read_text())["first"] == 1


def test_what_is_refused_is_the_exit_code(monkeypatch, tmp_path):
    def measure():
        yield {"refused": ["triton counts 1, the reference 2"]}
        yield {"rows": {}}

    code, report = script(monkeypatch, tmp_path, measure, "RESULT")
    assert (code, report["refused"]) == (1, ["triton counts 1, the reference 2"])


def test_flags_have_the_kinds_of_their_defaults(monkeypatch, tmp_path, capsys):
    seen = []

    def measure(**options):
        seen.append((options, torch.rand(1)))
        yield {}

    flags = dict(positional=("before",), repeats=20, p=0.1, only=("linear", "pass"))
    script(monkeypatch, tmp_path, measure, "there", "RESULT", **flags)
    script(monkeypatch, tmp_path, measure, "there", "RESULT", "--repeats", "2", "--p", "1", "--only", "pass", **flags)
    (first, drawn), (second, again) = seen
    assert first == dict(before="there", repeats=20, p=0.1, only=("linear", "pass"))
    assert second == dict(before="there", repeats=2, p=1.0, only=["pass"]) and type(second["p"]) is float
    assert torch.equal(drawn, again)  # the same data in every run
    for wrong in (["--only", "all"], ["--repeats", "2.5"], ["--rounds", "3"]):
        with pytest.raises(SystemExit) as stop:
            script(monkeypatch, tmp_path, measure, "there", "RESULT", *wrong, **flags)
        assert stop.value.code == 2
    assert "invalid choice: 'all'" in capsys.readouterr().err and len(seen) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_a_script_for_a_gpu_refuses_to_run_without(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_x.py", str(tmp_path / "x.json")])
    with pytest.raises(SystemExit) as stop:
        results.main("A script.", lambda: pytest.fail("the work had begun"))
    assert stop.value.code == 2 and "torch sees none" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{}, {"pack_gradients": True, "max_grad_norm": float("inf")}], ids=["", "packed"])
def test_the_row_of_a_child_says_what_its_state_takes(options, one_thread):
    shapes, made = [(40, 30), (50,), (2,)], []

    def factory(params):
        mask = ChildMask.from_dense({str(i): torch.rand(p.shape) < 0.5 * (i < 2) for i, p in enumerate(params)})
        made.append((ChildAdamW(params, mask=mask, **options), params))
        return made[0][0]

    row = results.measure_step("D", factory, shapes, torch.device("cpu"), torch.float32, 2)
    optimizer, params = made[0]
    held = sum(t.nbytes for entry in optimizer.state.values() for t in entry.values())
    assert row["state_bytes"] == held + 4 * optimizer.mask.count()  # moments, step counters, and an index a weight
    assert row["touched"] > 0.9 and "bytes" not in row
    assert all((p.grad is None) == bool(options) for p in params)  # a packed gradient has gone through its hook
    assert {int(optimizer.state[p]["step"]) for p in params} == {3 + 2 + 1}  # warm-up, timed, checked
    assert 0 < row["step_min"] <= row["step"] <= row["step_max"]


def test_a_step_that_does_nothing_is_not_timed():
    class Idle(torch.optim.SGD):
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                self.state[p].setdefault("step", 1)

    with pytest.raises(RuntimeError, match="must update all 2 parameters, got one without 2"):
        results.measure_step("none", Idle, [(3,), (4,)], torch.device("cpu"), torch.float32, 1)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_give_their_flags_and_hand_over(name, monkeypatch):
    if "import transformers" in (BENCHMARKS / name).read_text():
        pytest.importorskip("transformers")
    calls = []
    monkeypatch.setattr(results, "main", lambda *given, **options: calls.append((given, options)) or 7)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
    [((description, measure), options)] = calls
    words = dict.fromkeys(options.pop("positional", ()))
    options.pop("device", None)
    assert stop.value.code == 7 and f"python benchmarks/{name} " in description and "RESULT.json" in description
    assert inspect.isgeneratorfunction(measure) and list(inspect.signature(measure).parameters) == [*words, *options]
