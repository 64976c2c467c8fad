"""The parity gate: whole implementations pass it, and no difference in any rule, tensor or bit of state does."""

from __future__ import annotations

import pytest
import torch

from childtune_kernels.measure import parity

CPU = torch.device("cpu")


@pytest.mark.usefixtures("one_thread")
def test_whole_implementations_pass(place, dtype):
    assert parity.difference(place.impl, torch.device(place.device), dtype) is None


def test_random_state_is_left_alone():
    before = torch.get_rng_state()
    parity.difference("reference", CPU)
    assert torch.equal(torch.get_rng_state(), before)


def broken(monkeypatch, wrong):
    """Have ``wrong(rule, result)`` change what the implementation under test, here "csrc", has trained."""
    trained = parity._trained

    def damaged(rule, impl, *where):
        result = trained(rule, "reference", *where)
        return result if impl == "reference" else wrong(rule, result)

    monkeypatch.setattr(parity, "_trained", damaged)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["single", "scalar", "step of odd", "exp_avg of matrix", "exp_avg_sq of large"])
@pytest.mark.parametrize("rule", parity.RULES)
def test_one_wrong_bit_is_found(rule, name, monkeypatch):
    def flip(trained, result):
        if trained == rule:
            value = result[name].view(-1)[-1:]
            value.view(torch.int64 if value.dtype == torch.float64 else torch.int32).bitwise_xor_(1)
        return result

    monkeypatch.setattr(parity, "RULES", {rule: parity.RULES[rule]})
    broken(monkeypatch, flip)
    assert parity.difference("csrc", CPU) == f"{rule}: {name} differ from the reference"


def test_every_rule_is_looked_at(monkeypatch):
    seen = []
    broken(monkeypatch, lambda rule, result: seen.append(rule) or result)
    assert parity.difference("csrc", CPU) is None
    assert seen == list(parity.RULES)


def test_what_an_implementation_raises_is_a_difference(monkeypatch):
    def fail(rule, result):
        if rule == "D":
            raise RuntimeError("no kernel image")
        return result

    broken(monkeypatch, fail)
    assert parity.difference("csrc", CPU) == "D: RuntimeError: no kernel image"


def test_an_optimizer_that_forgets_its_last_tensor_is_found(monkeypatch):
    class Forgetful(parity.ChildAdamW):
        def __init__(self, params, *, impl, **options):
            self.forgets = impl == "csrc"
            super().__init__(params, impl="reference", **options)

        def step(self, closure=None):
            last = self.param_groups[-1]["params"][-1]
            before = last.detach().clone()
            super().step(closure)
            if self.forgets:
                last.data.copy_(before)

    monkeypatch.setattr(parity, "ChildAdamW", Forgetful)
    assert parity.difference("csrc", CPU) == "no mask: matrix differ from the reference"


def test_rules_are_what_they_are_called(monkeypatch):
    seen = []

    class Seen(parity.ChildAdamW):
        def __init__(self, params, **options):
            seen.append(options)
            super().__init__(params, **options)

    monkeypatch.setattr(parity, "ChildAdamW", Seen)
    assert set(parity.RULES) >= {"no mask", "F", "D", "D, dense state", "F in D", "D, packed gradient"}
    for rule in parity.RULES:
        result, options = parity._trained(rule, "reference", CPU, torch.float32), seen[-1]
        kinds = "mask" in options, options.get("reserve_p", 1) < 1, options.get("pack_gradients", False)
        assert kinds == ("D" in rule, "F" in rule, "packed gradient" in rule)
        assert set(parity.SHAPES) <= set(result)
        if "D" in rule:
            assert not set(options["mask"]) & set(parity.OUTSIDE)
            kept = parity.SHAPES["large"] if "dense" in rule else (options["mask"].count("large"),)
            assert result["exp_avg of large"].shape == kept
