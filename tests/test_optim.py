"""ChildAdamW: what it does to weights and moments, and which masks it uses."""

from __future__ import annotations

import pytest
import torch
from cases import (
    KINDS,
    MODEL,
    child_mask,
    model,
    moments_of,
    optimizer,
    same_training,
    set_grads,
    snapshot,
    train,
    unchanged,
    weights_of,
)
from oracles import Judge, same_bits

from childtune_kernels import ChildAdamW, ChildMask, ops, philox


@pytest.mark.parametrize("kind", KINDS)
def test_against_algorithm_1_in_fp64(kind, dialect, dtype, place):
    named = model(place.device, dtype)
    opt = optimizer(named, kind, dialect=dialect, impl=place.impl, betas=(0.9, 0.99), eps=1e-6)
    judges = {name: Judge(param) for name, param in named}
    for t in range(1, 31):
        set_grads(named, t)
        opt.step()
        for name, param in named:
            masks = {}
            if kind.startswith("F"):
                masks = dict(keep=philox.mask_at(name, MODEL[name], seed=5, step=t, p=0.3), p=0.3)
            if "D" in kind and name in child_mask():
                masks.update(child=child_mask().to_dense(name), decay="all" if kind.endswith("all") else "child")
            adamw = dict(lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-6, dialect=dialect)
            judges[name].step(param.grad, **adamw, **masks)
    for (name, param), moments in zip(named, moments_of(opt), strict=True):
        assert opt.state[param]["step"].item() == 30 and {x.dtype for x in moments} == {torch.float32}
        judges[name].check(param, *moments)


@pytest.mark.parametrize("kind", KINDS)
def test_implementations_agree_bitwise(kind, dialect, place):
    runs = []
    for impl, device in (("reference", "cpu"), (place.impl, place.device)):
        named = model(device)
        opt = optimizer(named, kind, dialect=dialect, impl=impl)
        train(opt, named, range(1, 6))
        runs += [named, opt]
    assert runs[3].impl == place.impl
    assert same_training(*runs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"maximize": True}], ids=["", "clip", "maximize"])
def test_gradients_are_never_modified(kind, options, dtype, place):
    named = model(place.device, dtype)
    opt = optimizer(named, kind, impl=place.impl, **options)
    for t in range(1, 4):
        set_grads(named, t)
        grads = [p.grad for _, p in named]
        before, versions = snapshot(grads), [g._version for g in grads]
        opt.step()
        assert all(p.grad is g for (_, p), g in zip(named, grads, strict=True))
        assert unchanged(before, grads) and versions == [g._version for g in grads]


def test_p_of_one_is_plain_adamw(place):
    plain, one, mixed = (model(place.device) for _ in range(3))
    opts = [optimizer(plain, impl=place.impl), optimizer(one, reserve_p=1.0, seed=9, impl=place.impl)]
    # The second group makes every parameter go through F's op, the first at p = 1.
    other = torch.nn.Parameter(torch.zeros(4, device=place.device))
    groups = [{"params": mixed}, {"params": [("other", other)], "reserve_p": 0.5}]
    opts.append(optimizer(groups, impl=place.impl))
    for opt, named in zip(opts, (plain, one, mixed), strict=True):
        train(opt, named, range(1, 6))
        other.grad = torch.ones_like(other)
    assert same_training(plain, opts[0], one, opts[1])
    assert unchanged(weights_of(plain), weights_of(mixed))


# ---- F --------------------------------------------------------------------------------------------------------------


def test_mask_at_is_the_mask_used(place):
    """With beta1 = 0 the first moment is the masked gradient itself."""
    named = model(place.device)
    groups = [{"params": named[:2], "reserve_p": 0.2, "seed": 3}, {"params": named[2:], "reserve_p": 0.7, "seed": 4}]
    opt = ChildAdamW(groups, betas=(0.0, 0.999), impl=place.impl)
    for t in range(1, 7):
        set_grads(named, t)
        opt.step()
        for i, (name, param) in enumerate(named):
            seed, p = (3, 0.2) if i < 2 else (4, 0.7)
            mask = opt.mask_at(t, name)
            assert mask.dtype == torch.bool and mask.shape == param.shape and mask.device == param.device
            assert torch.equal(opt.state[param]["exp_avg"] != 0, mask)
            assert torch.equal(mask.cpu(), philox.mask_at(name, param.shape, seed=seed, step=t, p=p))
            kept = param.grad * torch.tensor(1 / p, dtype=torch.float32)  # Eq. 4, rounded once
            assert same_bits(opt.state[param]["exp_avg"][mask], kept[mask])
    assert not torch.equal(opt.mask_at(6, "head.weight"), opt.mask_at(5, "head.weight"))


def test_without_names_the_stream_is_keyed_by_position():
    named = model()
    groups = [{"params": [p for _, p in named[:2]]}, {"params": [p for _, p in named[2:]]}]
    opt = ChildAdamW(groups, reserve_p=0.5, seed=8)
    train(opt, named, [1])
    for i, (_, param) in enumerate(named):
        mask = philox.mask_at(str(i), param.shape, seed=8, step=1, p=0.5)
        assert torch.equal(opt.state[param]["exp_avg"] != 0, mask) and torch.equal(opt.mask_at(1, str(i)), mask)


def test_masks_depend_on_names_not_on_order_groups_or_dtype(place):
    def masks(named, groups):
        opt = ChildAdamW(groups, betas=(0.0, 0.9), reserve_p=0.4, seed=1, impl=place.impl)
        train(opt, named, [1, 2])
        return {name: opt.state[param]["exp_avg"] != 0 for name, param in named}

    one, split, half = model(place.device), model(place.device), model(place.device, torch.bfloat16)
    expected = masks(one, one)
    groups = [{"params": split[3:]}, {"params": [split[1], split[0]]}, {"params": [split[2]]}]
    for got in (masks(split, groups), masks(half, half)):
        assert all(torch.equal(got[name], expected[name]) for name in MODEL)


def test_equal_shapes_and_other_seeds_draw_other_masks():
    named = [(name, torch.nn.Parameter(torch.zeros(400))) for name in ("a", "b")]
    opts = [ChildAdamW(named, reserve_p=0.5, seed=seed) for seed in (0, 1, 2**64 - 1)]
    masks = [opt.mask_at(1, name) for opt in opts for name in ("a", "b")]
    assert all(not torch.equal(masks[i], masks[j]) for i in range(6) for j in range(i))


def test_moments_and_weights_of_masked_elements_still_decay(dialect, place):
    """F masks the gradient only: momentum goes on moving the weight, and every weight decays."""
    named = model(place.device)
    opt = optimizer(named, "F", dialect=dialect, impl=place.impl)
    train(opt, named, range(1, 5))
    before = {
        name: (p.detach().clone(), *(opt.state[p][k].clone() for k in ("exp_avg", "exp_avg_sq"))) for name, p in named
    }
    train(opt, named, [5])
    for name, param in named:
        masked, (w, m, v) = ~opt.mask_at(5, name), before[name]
        for key, old, beta in (("exp_avg", m, 0.9), ("exp_avg_sq", v, 0.999)):
            decayed = old * torch.tensor(beta, dtype=torch.float32, device=place.device)
            assert same_bits(opt.state[param][key][masked], decayed[masked] + 0.0)
        assert (param.detach()[masked] != w[masked]).all()
    assert all((~opt.mask_at(5, name)).any() for name in ("embed.weight", "layer.weight", "head.weight"))


def test_a_masked_weight_without_momentum_decays_only(dialect, place):
    param = torch.nn.Parameter(torch.linspace(1, 2, 1000, device=place.device))
    opt = ChildAdamW([param], lr=0.1, weight_decay=0.5, reserve_p=0.5, dialect=dialect, impl=place.impl)
    before = param.detach().clone()
    train(opt, [("0", param)], [1])
    masked = ~opt.mask_at(1, "0")
    shrink = torch.tensor(-0.05, dtype=torch.float32)
    assert same_bits(param[masked], (before + shrink.to(place.device) * before)[masked])


# ---- D --------------------------------------------------------------------------------------------------------------


def test_outside_the_child_nothing_ever_changes(dtype, dialect, place):
    named = model(place.device, dtype)
    before = dict(zip(MODEL, weights_of(named), strict=True))
    opt = optimizer(named, "D", dialect=dialect, weight_decay=0.5, lr=0.05, impl=place.impl)
    ever_changed = {name: torch.zeros_like(weight).bool() for name, weight in before.items()}
    for t in range(1, 101):  # a 16-bit weight may come back to where it was
        train(opt, named, [t])
        for name, param in named:
            ever_changed[name] |= param.detach() != before[name]
    for (name, param), moments in zip(named, moments_of(opt), strict=True):
        child = child_mask().to_dense(name).to(place.device) if name in child_mask() else torch.ones_like(param).bool()
        assert torch.equal(opt.mask_at(50, name), child)
        assert torch.equal(ever_changed[name], child)
        assert same_bits(param.detach()[~child], before[name][~child])
        for moment in moments:
            assert torch.equal(moment != 0, child)


def test_decay_all_shrinks_the_rest(dialect, place):
    named = model(place.device)
    before = dict(zip(MODEL, weights_of(named), strict=True))
    opt = optimizer(named, "D, decay all", dialect=dialect, impl=place.impl)
    child_only = model(place.device)
    train(optimizer(child_only, "D", dialect=dialect, impl=place.impl), child_only, range(1, 21))
    train(opt, named, range(1, 21))
    shrink = torch.tensor(-1e-2 * 0.1, dtype=torch.float32).to(place.device)
    for (name, param), (_, other) in zip(named, child_only, strict=True):
        outside = before[name]
        for _ in range(20):
            outside = outside + shrink * outside
        child = opt.mask_at(1, name)
        assert same_bits(param.detach()[~child], outside[~child])
        assert same_bits(param.detach()[child], other.detach()[child]), "decay scope must not matter inside the child"


def test_a_full_child_is_plain(place):
    masked, plain = model(place.device), model(place.device)
    full = ChildMask.from_dense({name: torch.ones(MODEL[name], dtype=torch.bool) for name, _ in masked})
    opt, reference = optimizer(masked, mask=full, impl=place.impl), optimizer(plain, impl=place.impl)
    train(opt, masked, range(1, 6))
    train(reference, plain, range(1, 6))
    assert unchanged(weights_of(plain), weights_of(masked))


@pytest.mark.parametrize("state", ["packed", "dense"])
def test_a_child_may_be_empty_in_some_parameters(state, place):
    named = model(place.device)
    before = dict(zip(MODEL, weights_of(named), strict=True))
    masks = {name: torch.zeros(MODEL[name], dtype=torch.bool) for name in MODEL}
    masks["layer.weight"][3, 5] = True
    opt = optimizer(named, mask=ChildMask.from_dense(masks), state=state, impl=place.impl)
    train(opt, named, range(1, 6))
    for name, param in named:
        changed = (param.detach() != before[name]).cpu()
        assert torch.equal(changed, masks[name])


# ---- what a caller can ask ------------------------------------------------------------------------------------------


def test_impl_says_what_serves(place):
    assert optimizer(model(place.device), impl=place.impl).impl == place.impl
    assert optimizer(model(place.device)).impl == ops.implementation("auto", place.device).NAME


@pytest.mark.parametrize("step, name, error", [(0, "norm.scale", ValueError), (1.0, "norm.scale", ValueError),
                                               (1, "pooler", KeyError)])  # fmt: skip
def test_mask_at_refuses(step, name, error):
    with pytest.raises(error, match="must be .* got"):
        optimizer(model(), "F").mask_at(step, name)
