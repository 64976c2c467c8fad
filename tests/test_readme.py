"""The README's code runs, in the order D needs, and its table is that of the committed result file."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from childtune_kernels.cli import demo

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


class Model(nn.Module):
    """Has layers and a head, as the README's code expects."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.layer(x).relu())


@pytest.fixture
def names() -> dict:
    """What the README calls yours."""
    batches = [(torch.randn(4, 8), torch.randint(3, (4,))) for _ in range(5)]
    return {"model": Model(), "batches": batches, "loss_function": nn.functional.cross_entropy}


def _blocks() -> dict[str, str]:
    f, d = BLOCKS
    return {"F": f, "D": d}


def test_f_runs(names):
    before = names["model"].layer.weight.detach().clone()
    exec(_blocks()["F"], names)
    assert not torch.equal(before, names["model"].layer.weight)
    assert 0 < names["optimizer"].mask_at(1, "layer.weight").double().mean() < 1


def test_d_runs_and_leaves_the_rest_alone(names, capsys):
    model = names["model"]
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    exec(_blocks()["D"], names)
    assert names["mask"].density() == pytest.approx(0.3, abs=0.01)
    for name in names["mask"]:
        child = names["mask"].to_dense(name)
        assert torch.equal(model.get_parameter(name)[~child], before[name][~child])
        assert not torch.equal(model.get_parameter(name)[child], before[name][child])
    assert not torch.equal(model.head.weight, before["head.weight"])
    assert "D: 2 tensors masked" in capsys.readouterr().out


def test_quickstart_runs(capsys):
    runpy.run_path(str(ROOT / "examples/quickstart.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "550 of the hidden layers' 5,504 weights have moved" in out
    scores = [float(score) for score in re.findall(r"training loss [\d.]+, held-out accuracy ([\d.]+) %", out)]
    assert len(scores) == 3 and min(scores) > 70  # all three learn something; chance is 50


def test_demo_table_is_the_committed_result():
    shown = re.search(r"<!-- demo:begin -->\n(.*?)\n<!-- demo:end -->", README, re.DOTALL)[1]
    results = json.loads((ROOT / "benchmarks/results/demo_cpu.json").read_text())
    assert shown == "\n".join([*demo.table(results), "", *demo.conclusions(results)])


def test_tables_are_those_of_the_committed_results():
    report = runpy.run_path(str(ROOT / "benchmarks" / "report.py"))
    shown = {
        ROOT / "README.md": {"speed": report["speed_section"]()},
        ROOT / "benchmarks/README.md": report["tables"](),
    }
    for path, blocks in shown.items():
        text = path.read_text()
        for name, block in blocks.items():
            assert f"<!-- {name}:begin -->\n{block}\n<!-- {name}:end -->" in text, f"{path.name}: {name}"
        assert {*re.findall(r"<!-- (\w+):begin", text)} - {"demo"} == set(blocks)


@pytest.mark.parametrize("readme", ["README.md", "benchmarks/README.md"])
def test_links_lead_somewhere(readme):
    path = ROOT / readme
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target
