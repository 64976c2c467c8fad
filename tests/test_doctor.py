"""`childtune doctor`: what it says of whole implementations and of broken ones."""

import pytest
import torch

from childtune_kernels import ops
from childtune_kernels.cli import doctor, main

pytestmark = pytest.mark.usefixtures("one_thread")


def test_doctor_is_content(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith("bit for bit against the reference: OK")
    chosen = ops.implementation("auto", "cpu").name
    assert [line.split()[:2] for line in out.splitlines() if line.endswith("<- auto")][0] == ["cpu", chosen]
    for impl in ops.IMPLEMENTATIONS:
        reason = ops.unavailable(impl, "cpu")
        assert any(line.startswith(f"cpu   {impl}") and (reason or "yes") in line for line in out.splitlines())


@pytest.mark.parametrize("broken", ["one bit", "an exception"])
def test_doctor_finds_a_broken_implementation(broken, monkeypatch, capsys):
    trained, calls = doctor._trained, []

    def damaged(method, impl, device_type):
        calls.append(impl)
        result = trained(method, impl, device_type)
        if method == "D" and len(calls) % 2 == 0:  # the second of each pair is the one under test
            if broken == "an exception":
                raise RuntimeError("no kernel image")
            result["matrix"].view(-1)[-1:].view(torch.int32).bitwise_xor_(1)
        return result

    monkeypatch.setattr(doctor, "_trained", damaged)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "FAILED: D: " + ("RuntimeError: no kernel image" if broken == "an exception" else "matrix differ") in out
    assert out.rstrip().endswith("FAILED")
