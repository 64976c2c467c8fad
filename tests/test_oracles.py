"""The oracles themselves, held against torch.optim.AdamW in fp64 and against each other."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import Judge, Oracle, assert_as_accurate, philox, same_bits, written_order_step

from childtune_kernels.philox import KNOWN_ANSWERS

# 40 steps of about 4 roundings each, on weights below 10.
FP64_ROUNDING = 40 * 4 * 10 * torch.finfo(torch.float64).eps


def _grads(n, steps):
    return [torch.randn(n, dtype=torch.float64) * 10 ** torch.randn(n, dtype=torch.float64) for _ in range(steps)]


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_torch_dialect_is_torchs_adamw(weight_decay):
    weight, hyper = torch.randn(101, dtype=torch.float64), dict(lr=0.03, betas=(0.8, 0.95), eps=1e-5)
    param = torch.nn.Parameter(weight.clone())
    adamw = torch.optim.AdamW([param], weight_decay=weight_decay, **hyper)
    oracle = Oracle(weight)
    for grad in _grads(101, 40):
        param.grad = grad.clone()
        adamw.step()
        oracle.step(grad, weight_decay=weight_decay, **hyper)
    assert torch.allclose(oracle.w, param.detach(), rtol=0, atol=FP64_ROUNDING)
    assert not torch.allclose(oracle.w, weight, rtol=0, atol=0.1)


def test_hf_dialect_is_torchs_adamw_with_a_corrected_eps():
    """eps before the correction of sqrt(v) is eps / sqrt(1 - beta2^t) after it; decay on the new weight is a factor."""
    weight, lr, decay, eps = torch.randn(101, dtype=torch.float64), 0.03, 0.2, 1e-2
    param = torch.nn.Parameter(weight.clone())
    adamw = torch.optim.AdamW([param], lr=lr, weight_decay=0.0)
    oracle = Oracle(weight)
    for t, grad in enumerate(_grads(101, 40), start=1):
        param.grad = grad.clone()
        adamw.param_groups[0]["eps"] = eps / math.sqrt(1 - 0.999**t)
        adamw.step()
        with torch.no_grad():
            param.mul_(1 - lr * decay)
        oracle.step(grad, lr=lr, weight_decay=decay, eps=eps, dialect="hf")
    assert torch.allclose(oracle.w, param.detach(), rtol=0, atol=FP64_ROUNDING)


@pytest.mark.parametrize("masked", ["none", "keep", "child", "child, decay all"])
def test_written_order_is_algorithm_1(masked, dialect):
    weight, judge_args = torch.randn(500), dict(lr=0.02, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1, dialect=dialect)
    w, m, v = weight.clone(), torch.zeros(500), torch.zeros(500)
    judge = Judge(weight)
    row = (0.02, 0.9, 0.99, 1e-6, 0.1, 0.25 if masked == "keep" else 1.0, 1.0, float(dialect == "hf"), math.inf, 0.0)
    child = torch.rand(500) < 0.4
    for t in range(1, 31):
        grad, keep = torch.randn(500), torch.rand(500) < 0.25
        kwargs, oracle_kwargs = {}, {}
        if masked == "keep":
            kwargs, oracle_kwargs = dict(keep=keep), dict(keep=keep, p=0.25)
        elif masked != "none":
            everywhere = masked.endswith("all")
            kwargs = dict(child=child, decay_outside=everywhere)
            oracle_kwargs = dict(child=child, decay="all" if everywhere else "child")
        w, m, v = written_order_step(w, grad, m, v, t, row, **kwargs)
        judge.step(grad, **judge_args, **oracle_kwargs)
    judge.check(w, m, v)


def test_an_error_above_the_allowance_is_refused():
    truth = torch.linspace(0.5, 1.0, 11, dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    assert_as_accurate((truth + 3 * eps).float(), truth, truth)
    with pytest.raises(AssertionError, match="eager"):
        assert_as_accurate((truth + 6 * eps).float(), truth, truth)


def test_same_bits_tells_zeros_apart_and_nan_alike():
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert same_bits(torch.tensor([math.nan]), torch.tensor([-math.nan]))
    assert not same_bits(torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.float16))


def test_philox_in_python_integers_gives_the_published_answers():
    for counter, key, expected in KNOWN_ANSWERS:
        assert philox(counter, key) == expected
