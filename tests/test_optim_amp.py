"""ChildAdamW under torch.amp.GradScaler: unscaling, overflow, clipping, and the mask of a retried step."""

from __future__ import annotations

import math

import pytest
import torch
from cases import KINDS, model, optimizer, same_training, set_grads, snapshot, state_of, train, unchanged, weights_of

SCALE = 1024.0  # a power of two: scaling and unscaling are exact


def scaled_step(scaler, opt, named, t, *, unscale=False, overflow=False, clip=None) -> None:
    """Scale a loss whose gradient is what `set_grads` gives, and step, as a training loop does."""
    set_grads(named, t)
    grads = [p.grad.clone() for _, p in named]
    opt.zero_grad()
    loss = sum((p * g).sum() for (_, p), g in zip(named, grads, strict=True))
    scaler.scale(loss).backward()
    if overflow:
        named[2][1].grad.view(-1)[0] = math.inf
    if unscale:
        scaler.unscale_(opt)
    if clip is not None:
        torch.nn.utils.clip_grad_norm_([p for _, p in named], clip)
    scaler.step(opt)
    scaler.update()


def run(kind, place, **kwargs):
    named = model(place.device)
    return (
        named,
        optimizer(named, kind, impl=place.impl, **kwargs),
        torch.amp.GradScaler(place.device, init_scale=SCALE),
    )


@pytest.mark.parametrize("unscale", [False, True], ids=["plain", "unscale_"])
@pytest.mark.parametrize("kind", KINDS)
def test_scaling_changes_nothing(kind, unscale, place):
    named, opt, scaler = run(kind, place)
    bare, bare_opt, _ = run(kind, place)
    for t in range(1, 6):
        scaled_step(scaler, opt, named, t, unscale=unscale)
        train(bare_opt, bare, [t])
    assert same_training(named, opt, bare, bare_opt)
    assert not hasattr(opt, "grad_scale") and not hasattr(opt, "found_inf")


@pytest.mark.parametrize("unscale", [False, True], ids=["plain", "unscale_"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [1, 3])
def test_overflow_changes_nothing_and_the_retry_draws_the_same_mask(at, kind, unscale, place):
    named, opt, scaler = run(kind, place)
    bare, bare_opt, _ = run(kind, place)
    for t in range(1, 6):
        if t == at:
            before = weights_of(named), snapshot(state_of(opt))
            scaled_step(scaler, opt, named, 100, unscale=unscale, overflow=True)
            assert unchanged(before[0], weights_of(named))
            assert unchanged(before[1], state_of(opt)) if at > 1 else not any(x.any() for x in state_of(opt))
            assert scaler.get_scale() == SCALE / 2
        scaled_step(scaler, opt, named, t, unscale=unscale)
        train(bare_opt, bare, [t])
    assert same_training(named, opt, bare, bare_opt)


@pytest.mark.parametrize("found", [1.0, 2.0])
def test_found_inf_skips_without_a_grad_scale_and_summed_over_devices(found, place):
    """After unscale_ there is no grad_scale; found_inf is a sum over devices, so it may exceed 1."""
    named, opt, _ = run("F", place)
    train(opt, named, [1])
    before = weights_of(named) + snapshot(state_of(opt))
    set_grads(named, 2)
    opt.grad_scale, opt.found_inf = None, torch.tensor(found, device=place.device)
    opt.step()
    assert unchanged(before, weights_of(named) + state_of(opt))


@pytest.mark.parametrize("kind", ["plain", "F"])
@pytest.mark.parametrize("unscale", [False, True], ids=["plain", "unscale_"])
def test_max_grad_norm_clips_the_unscaled_gradient(kind, unscale, place):
    """The scale is a power of two, so the norm of scaled gradients is the scaled norm, to the bit."""
    named, opt, scaler = run(kind, place, max_grad_norm=0.5)
    bare, bare_opt, _ = run(kind, place, max_grad_norm=0.5)
    loose, loose_opt, _ = run(kind, place)
    for t in range(1, 4):
        scaled_step(scaler, opt, named, t, unscale=unscale)
        train(bare_opt, bare, [t], scale=1.0)
        train(loose_opt, loose, [t])
    assert same_training(named, opt, bare, bare_opt)
    assert not same_training(named, opt, loose, loose_opt)


def test_clip_grad_norm_between_unscale_and_step(place):
    """The usual recipe works as well, and gives what max_grad_norm gives up to the clipped gradients' rounding."""
    named, opt, scaler = run("plain", place)
    folded, folded_opt, folded_scaler = run("plain", place, max_grad_norm=0.5)
    for t in range(1, 6):
        scaled_step(scaler, opt, named, t, unscale=True, clip=0.5)
        scaled_step(folded_scaler, folded_opt, folded, t)
    rounding = 5 * 4 * 8 * torch.finfo(torch.float32).eps  # five steps of four roundings, weights below 8
    for (_, a), (_, b) in zip(named, folded, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=rounding)
    assert state_of(opt)[0].abs().max() < 0.5  # the clipped gradient bounds its moment


def test_an_overflow_in_a_clipped_step_is_skipped(place):
    named, opt, scaler = run("F", place, max_grad_norm=1.0)
    train(opt, named, [1])
    before = weights_of(named) + snapshot(state_of(opt))
    scaled_step(scaler, opt, named, 2, overflow=True)
    assert unchanged(before, weights_of(named) + state_of(opt))


def test_scaler_counts_as_with_torchs_adamw():
    """Overflow, growth and backoff leave both optimizers at the same weights, up to rounding."""
    ours, theirs = model(), model()
    opt = optimizer(ours)
    adamw = torch.optim.AdamW([p for _, p in theirs], lr=1e-2, weight_decay=0.1, foreach=False)
    scalers = [torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=2) for _ in range(2)]
    for t in range(1, 11):
        scaled_step(scalers[0], opt, ours, t, overflow=t in (1, 6))
        scaled_step(scalers[1], adamw, theirs, t, overflow=t in (1, 6))
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert all(opt.state[p]["step"].item() == 8 for _, p in ours)
    rounding = 8 * 4 * 8 * torch.finfo(torch.float32).eps
    assert all(torch.allclose(a, b, rtol=0, atol=rounding) for (_, a), (_, b) in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_16_bit_gradients_may_stay_scaled(dtype, place):
    named, bare = (model(place.device, dtype) for _ in range(2))
    opts = optimizer(named, "F", impl=place.impl), optimizer(bare, "F", impl=place.impl)
    for t in range(1, 4):
        set_grads(named, t, scale=64.0)
        opts[0].grad_scale = torch.tensor(64.0, device=place.device)
        opts[0].found_inf = torch.tensor(0.0, device=place.device)
        opts[0].step()
        train(opts[1], bare, [t])
    assert same_training(named, opts[0], bare, opts[1])
