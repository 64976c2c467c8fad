"""`childtune doctor`: what it says of whole implementations and of broken ones."""

import pytest

from childtune_kernels import ops
from childtune_kernels.cli import bench, doctor, main
from childtune_kernels.measure import parity

pytestmark = pytest.mark.usefixtures("one_thread")


def test_doctor_is_content(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith("bit for bit against the reference: OK")
    chosen = ops.implementation("auto", "cpu").NAME
    assert [line.split()[:2] for line in out.splitlines() if line.endswith("<- auto")][0] == ["cpu", chosen]
    for impl in ops.IMPLEMENTATIONS:
        reason = ops.unavailable(impl, "cpu")
        assert any(line.startswith(f"cpu   {impl}") and (reason or "yes") in line for line in out.splitlines())


@pytest.mark.parametrize("how", ["D: matrix differ from the reference", "D: RuntimeError: no kernel image"])
def test_doctor_finds_a_broken_implementation(how, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "difference", lambda impl, device: how if impl == "reference" else None)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert [line.split()[1] for line in out.splitlines() if f"FAILED: {how}" in line][0] == "reference"
    assert out.rstrip().endswith("FAILED")


def test_doctor_and_bench_have_one_gate():
    assert doctor.difference is bench.difference is parity.difference
