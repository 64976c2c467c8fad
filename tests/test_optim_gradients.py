"""Packed gradients and steps inside backward: the same bits as ordinary training, with p.grad freed on the way."""

from __future__ import annotations

import copy
import functools
import gc
import math
import pickle
import warnings

import pytest
import torch
from cases import MODEL, child_mask, same_training, unchanged, weights_of
from torch import nn

from childtune_kernels import ChildAdamW, ChildMask

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """An embedding tied to the head, a frozen layer, an unused one, a norm: what hooks may stumble over."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(17, 6)
        self.body = nn.Linear(6, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 17, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids, reentrant=None):
        x = self.embed(ids)
        if reentrant is None:
            y = self.body(x)
        else:
            y = torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=reentrant)
        return self.head(self.norm(y + self.frozen(x)))


def net(device, dtype=torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(device, dtype)


def mask_of(model) -> ChildMask:
    """Partial, wholly inside, wholly outside; the norm is not named."""
    generator = torch.Generator().manual_seed(4)
    dense = {n: torch.rand(p.shape, generator=generator) < 0.4 for n, p in model.named_parameters() if "norm" not in n}
    dense["body.bias"][:] = True
    dense["unused.weight"][:] = False
    return ChildMask.from_dense(dense)


def backward(model, t: int, parts: int = 1, **kwargs) -> None:
    for part in range(parts):
        ids = torch.randint(17, (4, 5), generator=torch.Generator().manual_seed(10 * t + part))
        ids = ids.to(next(model.parameters()).device)
        logits = model(ids, **kwargs).float()
        nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()


def trained(place, options, steps=4, dtype=torch.float32, parts=1, **kwargs):
    model = net(place.device, dtype)
    opt = ChildAdamW(model.named_parameters(), lr=1e-2, impl=place.impl, **options(model))
    for t in range(steps):
        backward(model, t, parts, **kwargs)
        opt.step()
        opt.zero_grad()
    return list(model.named_parameters()), opt


KINDS = {
    "D": lambda model: dict(mask=mask_of(model)),
    "F in D": lambda model: dict(mask=mask_of(model), reserve_p=0.4, seed=3),
    "F": lambda model: dict(reserve_p=0.4, seed=3),
    "plain": lambda model: {},
}


def with_option(kind, **more):
    return lambda model: {**KINDS[kind](model), **more}


@pytest.mark.parametrize("parts", [1, 3], ids=["", "accumulated"])
@pytest.mark.parametrize("kind", ["D", "F in D"])
def test_packed_gradients_train_to_the_same_bits(kind, parts, dtype, place):
    usual = trained(place, KINDS[kind], dtype=dtype, parts=parts)
    packed = trained(place, with_option(kind, pack_gradients=True), dtype=dtype, parts=parts)
    assert same_training(*usual, *packed)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_in_backward_train_to_the_same_bits(kind, dtype, place):
    usual = trained(place, KINDS[kind], dtype=dtype)
    fused = trained(place, with_option(kind, fused_backward=True), dtype=dtype)
    assert same_training(*usual, *fused)


@pytest.mark.parametrize("option", ["pack_gradients", "fused_backward"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(option, reentrant, place):
    usual = trained(place, KINDS["D"])
    other = trained(place, with_option("D", **{option: True}), reentrant=reentrant)
    assert same_training(*usual, *other)


def test_gradients_are_freed_inside_backward(place):
    """At any time at most one masked parameter has a full gradient."""
    model = net(place.device)
    opt = ChildAdamW(model.named_parameters(), mask=mask_of(model), pack_gradients=True, impl=place.impl)
    named = {n: p for n, p in model.named_parameters() if n in opt.mask and n != "body.bias"}
    seen = []
    for p in named.values():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda _: seen.append(sum(q.grad is not None for q in named.values())))
    backward(model, 0)
    assert len(seen) == 2 and set(seen) == {0} and model.body.bias.grad is not None


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none, place):
    usual, packed = (
        (model, ChildAdamW(model.named_parameters(), mask=mask_of(model), impl=place.impl, **options))
        for options in ({}, {"pack_gradients": True})
        for model in [net(place.device)]
    )
    for model, opt in (usual, packed):
        backward(model, 1)
        opt.zero_grad(set_to_none)
        opt.step()
        backward(model, 2)
        opt.step()
    assert unchanged(*(weights_of(list(model.named_parameters())) for model, _ in (usual, packed)))


def test_clipping_takes_the_childs_norm(place):
    """The same as clipping full gradients of which nothing outside the child is left."""
    packed = trained(place, with_option("D", pack_gradients=True, max_grad_norm=0.05), steps=1)
    model = net(place.device)
    mask = mask_of(model)
    opt = ChildAdamW(model.named_parameters(), lr=1e-2, mask=mask, impl=place.impl)
    backward(model, 0)
    for name, p in model.named_parameters():
        if p.grad is not None and name in mask:
            p.grad *= mask.to_dense(name).to(p.device)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    assert norm > 0.05
    opt.step()
    for a, b in zip(weights_of(packed[0]), weights_of(list(model.named_parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def _closure(model, opt, t):
    opt.zero_grad()
    backward(model, t)
    return t


@pytest.mark.parametrize("option", ["pack_gradients", "fused_backward"])
def test_closures_and_schedules(option, place):
    runs = []
    for options in ({}, {option: True}):
        model = net(place.device)
        opt = ChildAdamW(model.named_parameters(), lr=1e-2, mask=mask_of(model), impl=place.impl, **options)
        schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
        for t in range(4):
            assert opt.step(functools.partial(_closure, model, opt, t)) == t
            schedule.step()
        runs += [list(model.named_parameters()), opt]
    assert same_training(*runs)


@pytest.mark.parametrize("option", ["pack_gradients", "fused_backward"])
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_have_hooks_of_their_own(option, copier, place):
    model = net(place.device)
    opt = ChildAdamW(model.named_parameters(), mask=mask_of(model), impl=place.impl, **{option: True})
    backward(model, 0)
    opt.step()
    opt.zero_grad()
    model2, opt2 = copier((model, opt))
    backward(model, 1)
    opt.step()
    backward(model2, 1)
    opt2.step()
    assert same_training(list(model.named_parameters()), opt, list(model2.named_parameters()), opt2)


def test_hooks_go_with_their_optimizer():
    model = net("cpu")
    opt = ChildAdamW(model.named_parameters(), mask=mask_of(model), pack_gradients=True)
    with pytest.raises(ValueError, match=r"parameter 'embed.weight' must be without another optimizer's hook"):
        ChildAdamW(model.named_parameters(), fused_backward=True)
    backward(model, 0)
    assert model.embed.weight.grad is None
    del opt
    gc.collect()
    backward(model, 0)
    assert model.embed.weight.grad is not None
    model.zero_grad()
    ChildAdamW(model.named_parameters(), fused_backward=True)


def test_a_second_gradient_before_the_step_is_refused(place):
    model = net(place.device)
    opt = ChildAdamW(model.named_parameters(), fused_backward=True, impl=place.impl)
    backward(model, 0)
    before = weights_of(list(model.named_parameters()))
    with pytest.raises(RuntimeError, match="step.. must follow each; a second gradient"):
        backward(model, 1)
    assert unchanged(before, weights_of(list(model.named_parameters())))
    model.zero_grad()
    opt.step()
    backward(model, 1)
    assert not unchanged(before, weights_of(list(model.named_parameters())))


@pytest.mark.parametrize("option", ["pack_gradients", "fused_backward"])
def test_gradients_set_by_hand_are_refused(option, place):
    model = net(place.device)
    opt = ChildAdamW(model.named_parameters(), mask=mask_of(model), impl=place.impl, **{option: True})
    backward(model, 0)
    before = weights_of(list(model.named_parameters()))
    model.embed.weight.grad = torch.ones_like(model.embed.weight)
    with pytest.raises(RuntimeError, match="must come from backward.*p.grad was set: 'embed.weight'"):
        opt.step()
    assert unchanged(before, weights_of(list(model.named_parameters())))


@pytest.mark.parametrize("option", ["pack_gradients", "fused_backward"])
def test_a_scaler_is_refused(option):
    model = net("cpu")
    opt = ChildAdamW(model.named_parameters(), mask=mask_of(model), **{option: True})
    backward(model, 0)
    before = weights_of(list(model.named_parameters()))
    opt.grad_scale, opt.found_inf = torch.tensor(8.0), torch.tensor(0.0)  # as GradScaler.step does
    with pytest.raises(RuntimeError, match="GradScaler looks for overflow in p.grad"):
        opt.step()
    assert unchanged(before, weights_of(list(model.named_parameters())))


def test_several_ranks_are_refused(monkeypatch):
    model = net("cpu")
    opt = ChildAdamW(model.named_parameters(), mask=mask_of(model), pack_gradients=True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    for option in ("pack_gradients", "fused_backward"):
        with pytest.raises(RuntimeError, match="must run on one rank, got 4"):
            ChildAdamW(net("cpu").named_parameters(), mask=mask_of(model), **{option: True})
    backward(model, 0)
    with pytest.raises(RuntimeError, match="must run on one rank, got 4"):
        opt.step()
    assert all(hook.grad is None for hook in opt.hooks.hooks.values())


BAD = [
    (dict(pack_gradients=True), "pack_gradients must be False where the state is not packed"),
    (dict(mask=child_mask(), state="dense", pack_gradients=True), "pack_gradients must be False where"),
    (dict(mask=child_mask(), pack_gradients=True, fused_backward=True), "fused_backward must be False where pack_grad"),
    (dict(fused_backward=True, max_grad_norm=1.0), "fused_backward must be False where .* max_grad_norm is given"),
]


@pytest.mark.parametrize("options, message", BAD, ids=range(len(BAD)))
def test_bad_combinations(options, message):
    named = [(name, nn.Parameter(torch.zeros(shape))) for name, shape in MODEL.items()]
    with pytest.raises(ValueError, match=message):
        ChildAdamW(named, **options)


# ---- used up by the step, whoever zeroes what ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["D", "F in D"])
@pytest.mark.parametrize("parts", [1, 2], ids=["", "accumulated"])
def test_a_loop_that_zeroes_the_model_only(kind, parts, place):
    """As Trainer does: the optimizer's own zero_grad is never called."""
    trained_models = []
    for options in ({}, {"pack_gradients": True}):
        model = net(place.device)
        opt = ChildAdamW(model.named_parameters(), lr=1e-2, impl=place.impl, **KINDS[kind](model), **options)
        for t in range(4):
            backward(model, t, parts)
            opt.step()
            model.zero_grad()
        trained_models.append((list(model.named_parameters()), opt))
    assert same_training(*trained_models[0], *trained_models[1])
    assert all(hook.grad is None for hook in trained_models[1][1].hooks.hooks.values())


def test_a_refused_step_keeps_the_packed_gradients(place):
    model = net(place.device)
    opt = ChildAdamW(model.named_parameters(), mask=mask_of(model), pack_gradients=True, impl=place.impl)
    backward(model, 0)
    opt.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr must be at least 0"):
        opt.step()
    assert any(hook.grad is not None for hook in opt.hooks.hooks.values())
    opt.param_groups[0]["lr"] = 1e-3
    opt.step()
    usual = net(place.device)
    twin = ChildAdamW(usual.named_parameters(), mask=mask_of(usual), impl=place.impl)
    backward(usual, 0)
    twin.step()
    assert same_training(list(model.named_parameters()), opt, list(usual.named_parameters()), twin)


@pytest.mark.parametrize("option", ["pack_gradients", "fused_backward"])
def test_gradients_set_by_hand_instead_of_backward_are_taken(option, place):
    """torch.distributed.checkpoint makes state exist that way."""
    named = []
    for options in ({}, {option: True}):
        model = net(place.device)
        opt = ChildAdamW(model.named_parameters(), lr=0.1, mask=mask_of(model), impl=place.impl, **options)
        for t in range(3):
            for i, p in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(10 * t + i)
                p.grad = torch.randn(p.shape, generator=generator).to(p.device) if p.requires_grad else None
            opt.step()
            opt.zero_grad()
        named.append((list(model.named_parameters()), opt))
    assert same_training(*named[0], *named[1])


# ---- clipping from outside is told -----------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["pack_gradients", "fused_backward"])
def test_who_could_clip_is_told_at_once(option):
    model = net("cpu")
    with pytest.warns(UserWarning, match=f"{option}=True .*clip_grad_norm_"):
        ChildAdamW(model.named_parameters(), mask=mask_of(model), **{option: True})
    for norm in (math.inf,) if option == "fused_backward" else (math.inf, 1.0):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = net("cpu")
            opt = ChildAdamW(model.named_parameters(), mask=mask_of(model), max_grad_norm=norm, **{option: True})
            backward(model, 0)
            opt.step()


@pytest.mark.parametrize("way", ["clip_grad_norm_", "clip_grad_value_", "by hand"])
def test_clipping_of_whole_tensors_alone_does_not_pass_for_clipping(way):
    """Told, naming what was clipped, and only where something was."""
    model = net("cpu")
    opt = ChildAdamW(model.named_parameters(), mask=mask_of(model), pack_gradients=True, max_grad_norm=1.0)

    def change(limit):
        if way == "by hand":
            model.norm.weight.grad = model.norm.weight.grad * min(limit, 1.0)
        else:
            getattr(nn.utils, way)(model.parameters(), limit)

    for t in range(3):
        backward(model, t)
        change(1e-3)
        with pytest.warns(
            UserWarning, match="changed between backward.* and step.*'norm.weight'.*packed gradients were"
        ):
            opt.step()
        opt.zero_grad()
    for limit in (None, 1e9):  # not at all, and as a trainer does that asks for the norm: times 1
        backward(model, 4)
        if limit is not None:
            change(limit)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            opt.step()
        opt.zero_grad()


def test_an_infinite_limit_is_no_clipping(place):
    usual = trained(place, KINDS["D"])
    other = trained(place, with_option("D", max_grad_norm=math.inf))
    assert same_training(*usual, *other)


def test_steps_in_backward_follow_parameters_to_other_groups(place):
    both = []
    for options in ({}, {"fused_backward": True, "max_grad_norm": math.inf}):
        model = net(place.device)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        groups = [{"params": named[:2], "lr": 0.1}, {"params": named[2:], "lr": 0.001}]
        opt = ChildAdamW(groups, impl=place.impl, **options)
        for t in range(3):
            backward(model, t)
            opt.step()
            opt.zero_grad()
            if t == 0:
                opt.param_groups[1]["params"].insert(0, opt.param_groups[0]["params"].pop())
        both.append((named, opt))
    assert same_training(*both[0], *both[1])


@pytest.mark.parametrize("option", ["pack_gradients", "fused_backward"])
def test_sparse_gradients_are_refused_where_they_come_up(option):
    table = nn.Embedding(9, 4, sparse=True)
    mask = ChildMask.from_dense({"weight": torch.eye(9, 4).bool()})
    opt = ChildAdamW(table.named_parameters(), mask=mask, max_grad_norm=math.inf, **{option: True})
    before = table.weight.detach().clone()
    with pytest.raises(RuntimeError, match="gradient of parameter 'weight' must be dense, got layout torch.sparse_coo"):
        table(torch.tensor([1, 2])).sum().backward()
        opt.step()
    assert torch.equal(table.weight, before) and not opt.state
