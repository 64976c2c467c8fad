"""Theorem 1 as a statistical test, global-norm clipping, ascent and non-finite gradients."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from cases import KINDS, model, optimizer, same_training, set_grads, train, weights_of
from oracles import assert_as_accurate, same_bits

from childtune_kernels import ChildAdamW

# For a fresh seed each statistical test would fail this often by chance; fixed seeds make them deterministic.
FALSE_ALARM = 1e-6

# A step's four roundings, on weights below 8.
ROUNDING = 4 * 8 * torch.finfo(torch.float32).eps


def z_bound(tests: int) -> float:
    return NormalDist().inv_cdf(1 - FALSE_ALARM / (2 * tests))


@pytest.fixture(scope="module", params=[0.1, 0.3, 0.7])
def draws(request):
    """(p, g~ / g) of 512 steps on two tensors of 500 weights; beta1 = 0 makes exp_avg the masked gradient g~."""
    p, steps, n = request.param, 512, 500
    named = [(name, torch.nn.Parameter(torch.zeros(n))) for name in ("a", "b")]
    opt = ChildAdamW(named, betas=(0.0, 0.999), reserve_p=p, seed=2)
    grads = [torch.linspace(0.5, 2.0, n), -torch.linspace(3.0, 1.0, n)]
    rows = []
    for _ in range(steps):
        for (_, param), grad in zip(named, grads, strict=True):
            param.grad = grad
        opt.step()
        rows.append(torch.stack([opt.state[w]["exp_avg"] / g for (_, w), g in zip(named, grads, strict=True)]))
    return p, torch.stack(rows).double()


class TestTheorem1:
    """E[g~] = g, Var[g~] = g^2 (1 - p) / p, and no covariance between elements, tensors or steps."""

    def test_mean(self, draws):
        p, x = draws
        spread = math.sqrt((1 - p) / p)
        assert abs(x.mean().item() - 1) / spread * math.sqrt(x.numel()) < z_bound(1)
        per_element = (x.mean(0) - 1) / spread * math.sqrt(len(x))
        # A binomial of 512 draws is skewed: Cornish-Fisher's first term widens the normal bound.
        bound = z_bound(per_element.numel())
        skew = (1 - 2 * p) / math.sqrt(p * (1 - p) * len(x))
        assert per_element.abs().max() < bound + abs(skew) * (bound**2 - 1) / 6

    def test_variance(self, draws):
        """The sample variance of N draws of two values has variance (kurtosis - 1) sigma^4 / N."""
        p, x = draws
        variance, kurtosis = (1 - p) / p, (1 - 3 * p * (1 - p)) / (p * (1 - p))
        z = (((x - 1) ** 2).mean().item() - variance) / (variance * math.sqrt((kurtosis - 1) / x.numel()))
        assert abs(z) < z_bound(1)

    @pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 32, 128], ids=lambda lag: f"lag{lag}")
    def test_covariance_of_elements_and_of_steps(self, draws, lag):
        p, x = draws
        x = (x - 1) / math.sqrt((1 - p) / p)
        for a, b in ((x[..., :-lag], x[..., lag:]), (x[:-lag], x[lag:])):
            assert abs((a * b).mean().item()) * math.sqrt(a.numel()) < z_bound(14)

    def test_covariance_of_tensors(self, draws):
        p, x = draws
        x = (x - 1) / math.sqrt((1 - p) / p)
        assert abs((x[:, 0] * x[:, 1]).mean().item()) * math.sqrt(x[:, 0].numel()) < z_bound(1)

    def test_two_values_only(self, draws):
        p, x = draws
        kept = x[x != 0]
        assert torch.allclose(kept, torch.full_like(kept, 1 / p), rtol=4 * torch.finfo(torch.float32).eps, atol=0)


# ---- clipping -------------------------------------------------------------------------------------------------------


def _clipped_pair(device, impl, max_norm, **kwargs):
    """Ours with max_grad_norm, and torch's clip_grad_norm_ + AdamW in fp64 and fp32, over the same gradients."""
    runs = {}
    for which in ("ours", "fp64", "fp32"):
        named = model(device if which == "ours" else "cpu", torch.float64 if which == "fp64" else torch.float32)
        if which == "ours":
            opt = optimizer(named, max_grad_norm=max_norm, impl=impl)
        else:
            opt = torch.optim.AdamW([p for _, p in named], lr=1e-2, weight_decay=0.1, foreach=False)
        for t in range(1, 16):
            set_grads(named, t, scale=1.0 if t % 2 else 0.001)  # above and below the bound
            if which != "ours":
                torch.nn.utils.clip_grad_norm_([p for _, p in named], max_norm)
            opt.step()
        runs[which] = weights_of(named)
    return runs


@pytest.mark.parametrize("max_norm", [0.7, 5.0, 1e6])
def test_clipping_is_torchs(max_norm, place):
    runs = _clipped_pair(place.device, place.impl, max_norm)
    for ours, truth, eager in zip(*runs.values(), strict=True):
        assert_as_accurate(ours, truth, eager, ulps=16)  # 15 steps; the norm's sum has another order


def test_clipping_matters_and_a_wide_bound_does_not(place):
    """The second moment cancels a constant factor: only changing norms show, and large eps."""
    runs = []
    for bound in (0.7, 1e6, None):
        named = model(place.device)
        opt = optimizer(named, max_grad_norm=bound, eps=1.0, impl=place.impl)
        train(opt, named, range(1, 4))
        runs.append((named, opt))
    assert not same_training(*runs[0], *runs[1])
    assert same_training(*runs[1], *runs[2])


def test_clipping_takes_the_norm_before_the_mask(place):
    """... of all parameters and groups together: the first step's moments are grad * clip / p where kept."""
    named = model(place.device)
    opt = optimizer([{"params": named[:2]}, {"params": named[2:]}], "F", max_grad_norm=0.5, impl=place.impl)
    set_grads(named, 1)
    opt.step()
    norm = math.sqrt(sum((p.grad.double() ** 2).sum().item() for _, p in named))
    for name, param in named:
        expected = param.grad.double() * opt.mask_at(1, name) * (0.5 / (norm + 1e-6)) / 0.3 * (1 - 0.9)
        assert torch.allclose(opt.state[param]["exp_avg"].double(), expected, rtol=1e-6, atol=0)  # 8 ulps


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize("max_norm", [None, 1.0], ids=["unclipped", "clipped"])
def test_non_finite_gradients_act_as_in_torch(bad, max_norm, place):
    """Without a scaler they reach the weights: one element, or with clipping whatever torch's clipping spoils."""
    ours, theirs = model(place.device), model()
    opt = optimizer(ours, max_grad_norm=max_norm, impl=place.impl)
    adamw = torch.optim.AdamW([p for _, p in theirs], lr=1e-2, weight_decay=0.1)
    for t in range(1, 4):
        for named in (ours, theirs):
            set_grads(named, t)
            if t == 2:
                named[1][1].grad[4, 2] = bad
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_([p for _, p in theirs], max_norm)
        opt.step()
        adamw.step()
    for (name, a), (_, b) in zip(ours, theirs, strict=True):
        assert torch.equal(a.isnan().cpu(), b.isnan()), name
        assert torch.allclose(a.cpu(), b, rtol=0, atol=3 * ROUNDING, equal_nan=True), name
    assert any(p.isnan().any() for _, p in ours)


@pytest.mark.parametrize("kind", KINDS)
def test_maximize_is_descent_on_negated_gradients(kind, place):
    up, down = model(place.device), model(place.device)
    opts = optimizer(up, kind, maximize=True, impl=place.impl), optimizer(down, kind, impl=place.impl)
    for t in range(1, 6):
        set_grads(up, t)
        set_grads(down, t)
        for _, param in down:
            param.grad = -param.grad
        for opt in opts:
            opt.step()
    # Kept zeros may differ in sign where the gradient is masked; the weights do not.
    assert all(same_bits(a, b) for a, b in zip(weights_of(up), weights_of(down), strict=True))


def test_maximize_per_group():
    named = model()
    opt = optimizer([{"params": named[:2], "maximize": True}, {"params": named[2:]}], weight_decay=0.0)
    before = weights_of(named)
    train(opt, named, [1])
    for i, ((_, param), old) in enumerate(zip(named, before, strict=True)):
        moved = (param.detach() - old) * param.grad
        assert (moved > 0).all() if i < 2 else (moved < 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_of_a_fresh_optimizer_moves_each_weight_by_lr(kind, place):
    """AdamW's first step is lr * sign(g), masked: an update applied twice, by autotuning say, would show."""
    named = model(place.device)
    before = weights_of(named)
    opt = optimizer(named, kind, weight_decay=0.0, lr=0.25, eps=0.0 if kind == "plain" else 1e-12, impl=place.impl)
    train(opt, named, [1])
    for (name, param), old in zip(named, before, strict=True):
        expected = old - 0.25 * param.grad.sign() * opt.mask_at(1, name)
        assert torch.allclose(param.detach(), expected, rtol=0, atol=ROUNDING)
