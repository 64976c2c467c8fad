"""ChildAdamW is a torch.optim.Optimizer: schedulers, closures, hooks, groups, copies, compilation."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from cases import KINDS, MODEL, model, optimizer, same_training, set_grads, train, unchanged, weights_of
from oracles import assert_as_accurate

from childtune_kernels import ChildAdamW

lr_scheduler = torch.optim.lr_scheduler
SCHEDULERS = {
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 3, gamma=0.3),
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 1 / (step + 1)),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.05, total_steps=20),
    "CosineAnnealing": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 10),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=1, factor=0.2),
}


def scheduled(opt, named, scheduler, steps=12) -> list[float]:
    lrs = []
    for t in range(1, steps + 1):
        set_grads(named, t)
        opt.step()
        plateau = (1.0,) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else ()
        scheduler.step(*plateau)
        lrs.append(float(opt.param_groups[0]["lr"]))
    return lrs


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_act_as_on_torchs_adamw(name, tensor_lr, place):
    weights, lrs = {}, {}
    for which in ("ours", "fp64", "fp32"):
        named = model(place.device if which == "ours" else "cpu", torch.float64 if which == "fp64" else torch.float32)
        lr = torch.tensor(0.02, device=place.device) if tensor_lr and which == "ours" else 0.02
        kwargs = dict(lr=lr, weight_decay=0.1)
        params = [p for _, p in named]
        ours = which == "ours"
        opt = (
            optimizer(named, impl=place.impl, **kwargs) if ours else torch.optim.AdamW(params, foreach=False, **kwargs)
        )
        lrs[which] = scheduled(opt, named, SCHEDULERS[name](opt))
        weights[which] = weights_of(named)
    assert lrs["ours"] == pytest.approx(lrs["fp64"], rel=1e-6) and len(set(lrs["fp64"])) > 1
    for ours, truth, eager in zip(*weights.values(), strict=True):
        # A tensor lr is fp32: half an ulp of lr in each of 12 steps of at most 0.05 stays below the allowance.
        assert_as_accurate(ours, truth, eager, ulps=12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_lr_is_a_float_lr(kind, place):
    runs = []
    for lr in (0.03125, torch.tensor(0.03125), torch.tensor([0.03125], dtype=torch.float64)):
        named = model(place.device)
        opt = optimizer(named, kind, lr=lr, impl=place.impl)
        train(opt, named, [1])
        if isinstance(lr, torch.Tensor):
            assert opt.param_groups[0]["lr"] is lr
            lr.fill_(0.5)
        else:
            opt.param_groups[0]["lr"] = 0.5
        train(opt, named, [2])
        runs.append((named, opt))
    assert same_training(*runs[0], *runs[1]) and same_training(*runs[0], *runs[2])
    frozen = model(place.device)
    opt = optimizer(frozen, kind, lr=0.03125, impl=place.impl)
    train(opt, frozen, [1, 2])
    assert not same_training(*runs[0], frozen, opt), "a frozen learning rate must show"


CHANGES = dict(lr=0.5, betas=(0.5, 0.6), eps=0.3, weight_decay=0.9, reserve_p=0.8, seed=77, maximize=True)


@pytest.mark.parametrize("change", [{key: value} for key, value in CHANGES.items()], ids=CHANGES)
def test_hyper_parameters_are_per_group_and_live(change, place):
    """A change of one group mid-run acts from the next step on, on that group alone, as if it had been made anew."""
    named, same = model(place.device), model(place.device)
    opt, other = (optimizer([{"params": n[:2]}, {"params": n[2:]}], "F", impl=place.impl) for n in (named, same))
    train(opt, named, [1, 2])
    train(other, same, [1, 2])
    opt.param_groups[1].update(change)
    fresh = optimizer([{"params": same[:2]}, {"params": same[2:], **change}], "F", impl=place.impl)
    train(opt, named, [3])
    unchanged_run = model(place.device)
    plain = optimizer(unchanged_run, "F", impl=place.impl)
    train(plain, unchanged_run, [1, 2, 3])
    assert unchanged(weights_of(named[:2]), weights_of(unchanged_run[:2]))
    assert all(not torch.equal(a, b) for (_, a), (_, b) in zip(named[2:], unchanged_run[2:], strict=True) if a.dim())
    fresh.state.update(other.state)
    train(fresh, same, [3])
    assert unchanged(weights_of(named), weights_of(same))


def test_closures():
    """Run once, first, with gradients enabled; its loss comes back; it may itself compute the gradients."""
    named, bare = model(), model()
    opt, calls = optimizer(named), []

    def closure():
        assert torch.is_grad_enabled()
        opt.zero_grad()
        loss = sum((p * p).sum() for _, p in named)
        loss.backward()
        calls.append(loss.item())
        return loss

    loss = opt.step(closure)
    assert calls == [loss.item()]
    for _, param in bare:
        param.grad = 2 * param.detach()
    bare_opt = optimizer(bare)
    assert bare_opt.step() is None
    assert same_training(named, opt, bare, bare_opt)


def test_hooks_fire_once():
    named = model()
    opt, calls = optimizer(named), []
    opt.register_step_pre_hook(lambda o, args, kwargs: calls.append(("pre", o is opt, named[0][1].detach().clone())))
    opt.register_step_post_hook(lambda o, args, kwargs: calls.append(("post", o is opt, named[0][1].detach().clone())))
    before = named[0][1].detach().clone()
    train(opt, named, [1])
    assert [(kind, own) for kind, own, _ in calls] == [("pre", True), ("post", True)]
    assert (
        torch.equal(calls[0][2], before)
        and torch.equal(calls[1][2], named[0][1])
        and not torch.equal(before, named[0][1])
    )


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(to_none):
    named = model()
    opt = optimizer(named)
    train(opt, named, [1])
    opt.zero_grad(set_to_none=to_none)
    assert all(p.grad is None if to_none else not p.grad.any() for _, p in named)
    before = weights_of(named)
    opt.step()
    assert unchanged(before, weights_of(named)) == to_none
    assert all(opt.state[p]["step"].item() == (1 if to_none else 2) for _, p in named)


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_added_mid_run(kind, place):
    """... starts at its own first step, beside the others' later ones."""
    named, whole = model(place.device), model(place.device)
    opt = optimizer(named[:1] + named[4:], kind, impl=place.impl)
    train(opt, [named[0], named[4]], [1, 2])
    opt.add_param_group({"params": named[1:4], "lr": 0.1})
    both = optimizer([{"params": whole[:1] + whole[4:]}, {"params": whole[1:4], "lr": 0.1}], kind, impl=place.impl)
    train(both, [whole[0], whole[4]], [1, 2])
    for opt_, n in ((opt, named), (both, whole)):
        train(opt_, n, [3, 4])
    assert same_training(named, opt, whole, both)
    assert [opt.state[p]["step"].item() for _, p in named] == [4, 2, 2, 2, 4]


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_train_on_alike_and_apart(kind, copier, after, place):
    named = model(place.device)
    opt = optimizer(named, kind, dialect="hf", max_grad_norm=3.0, state_dtype=torch.bfloat16, impl=place.impl)
    train(opt, named, range(1, after + 1))
    other, other_named = copier((opt, named))
    train(opt, named, [4, 5])
    before = weights_of(named)
    train(other, other_named, [4, 5])
    assert unchanged(before, weights_of(named)), "a copy must not share tensors"
    assert same_training(named, opt, other_named, other)
    assert other.describe() == opt.describe() and other.impl == opt.impl
    assert torch.equal(other.mask_at(6, "head.weight"), opt.mask_at(6, "head.weight"))


def test_each_parameter_counts_its_own_steps(place):
    """A parameter whose gradient arrives late has its own bias correction and its own mask stream, as in torch."""
    named, theirs = model(place.device), model()
    opt = optimizer(named, impl=place.impl)
    adamw = torch.optim.AdamW([p for _, p in theirs], lr=1e-2, weight_decay=0.1, foreach=False)
    present = [(0, 1, 2, 3, 4), (0, 2), (), (1, 2, 4), (0, 4), (3,), (0, 1, 2, 3, 4)]
    for t, positions in enumerate(present, start=1):
        for o, n in ((opt, named), (adamw, theirs)):
            set_grads(n, t)
            for i in set(range(5)) - set(positions):
                n[i][1].grad = None
            o.step()
    for i, ((_, a), (_, b)) in enumerate(zip(named, theirs, strict=True)):
        assert opt.state[a]["step"].item() == adamw.state[b]["step"].item() == sum(i in p for p in present)
        rounding = len(present) * 4 * 8 * torch.finfo(torch.float32).eps
        assert torch.allclose(a.cpu(), b, rtol=0, atol=rounding)


def test_late_gradients_draw_the_mask_of_their_own_step():
    named = model()
    opt = optimizer(named, "F", betas=(0.0, 0.9))
    train(opt, named[:3], [1, 2])
    train(opt, named, [3])
    for i, (name, param) in enumerate(named):
        assert torch.equal(opt.state[param]["exp_avg"] != 0, opt.mask_at(3 if i < 3 else 1, name))


def test_the_step_counter_passes_256_under_a_bf16_default_dtype(place):
    torch.set_default_dtype(torch.bfloat16)
    try:
        named = model(place.device)[:1]
        opt = optimizer(named, "F", impl=place.impl)
        train(opt, named, range(1, 301))
    finally:
        torch.set_default_dtype(torch.float32)
    normal = model(place.device)[:1]
    reference = optimizer(normal, "F", impl=place.impl)
    train(reference, normal, range(1, 301))
    assert opt.state[named[0][1]]["step"].item() == 300
    assert same_training(named, opt, normal, reference)


@pytest.mark.parametrize("kind", KINDS)
def test_compiling_around_step_falls_back(kind):
    named, eager = model(), model()
    opt, eager_opt = optimizer(named, kind), optimizer(eager, kind)

    def update(scale):
        for _, param in named:
            param.grad = param.detach() * scale
        opt.step()
        return scale + 1

    compiled = torch.compile(update, backend="aot_eager")
    for t in range(1, 4):
        assert compiled(torch.tensor(float(t))) == t + 1
        for _, param in eager:
            param.grad = param.detach() * float(t)
        eager_opt.step()
    assert same_training(named, opt, eager, eager_opt)


def test_no_gradients_at_all_is_a_no_op():
    named = model()
    opt = optimizer(named, "F", max_grad_norm=1.0)
    opt.step()
    assert not opt.state and unchanged(weights_of(model()), weights_of(named))


def test_construction_and_steps_are_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        named = model()
        opt = optimizer(named, "F", max_grad_norm=1.0)
        scheduler = lr_scheduler.StepLR(opt, 1)
        train(opt, named, [1, 2])
        scheduler.step()


def test_repr_and_defaults_are_readable():
    opt = ChildAdamW(model())
    group = opt.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-3, (0.9, 0.999), 1e-8, 1e-2)
    assert group["param_names"] == list(MODEL) and "reserve_p: 1.0" in repr(opt)
