"""From run to run: children travel with their state, loaders get copies, counters go on, replaced weights count."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
import torch.distributed.checkpoint as dcp
from cases import (
    KINDS,
    child_mask,
    model,
    optimizer,
    same_training,
    set_grads,
    snapshot,
    state_of,
    train,
    unchanged,
    weights_of,
)
from oracles import Oracle, assert_as_accurate
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from childtune_kernels import ChildAdamW, ChildMask, philox


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- the child of a state -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["D", "F in D", "D, dense"])
def test_an_optimizer_without_a_mask_takes_on_the_child(kind, dtype, place):
    named = model(place.device, dtype)
    opt = optimizer(named, kind, impl=place.impl)
    train(opt, named, [1, 2])
    other = [(name, nn.Parameter(p.detach().clone())) for name, p in named]
    resumed = optimizer(other, impl=place.impl)
    with pytest.warns(UserWarning, match="belongs to a child network and this optimizer was given no mask"):
        resumed.load_state_dict(saved_and_loaded(opt.state_dict()))
    assert resumed.mask == opt.mask and resumed.config.packing is not None
    frozen = {name: p.detach().clone() for name, p in other}
    for o, parameters in ((opt, named), (resumed, other)):
        train(o, parameters, [3, 4])
    resumed.assert_frozen(frozen)
    if kind != "D, dense":
        assert same_training(named, opt, other, resumed)
    elif dtype == torch.float32:
        assert unchanged(weights_of(named), weights_of(other))


def test_a_child_of_parameters_that_took_no_step_is_in_the_state():
    """Frozen, without gradient, or no step at all: the mask is rebuilt whole."""
    for steps in ([], [1]):
        named = model()
        named[0][1].requires_grad_(False)
        opt = optimizer(named, "D")
        for t in steps:
            set_grads(named, t)
            named[0][1].grad = None
            opt.step()
        resumed = optimizer(model())
        with pytest.warns(UserWarning, match="takes on that child"):
            resumed.load_state_dict(saved_and_loaded(opt.state_dict()))
        assert resumed.mask == opt.mask
        torch.optim.AdamW([p for _, p in model()]).load_state_dict(opt.dense_state_dict())


@pytest.mark.parametrize("options", [dict(decay="all"), dict(state="dense")], ids=str)
def test_a_child_without_room_is_refused(options):
    named = model()
    opt = optimizer(named, "D")
    train(opt, named, [1])
    other = model()
    plain = optimizer(other, **options)
    train(plain, other, [5])
    before = weights_of(other) + snapshot(state_of(plain))
    with pytest.raises(ValueError, match=r"must be a dense_state_dict\(\).* got \"a child network's\""):
        plain.load_state_dict(opt.state_dict())
    assert unchanged(before, weights_of(other) + state_of(plain)) and plain.mask is None
    plain.load_state_dict(opt.dense_state_dict())  # without the child: every weight
    assert plain.mask is None


def test_what_a_state_dict_holds_of_the_mask_is_a_copy():
    mask = child_mask()
    named = model()
    opt = optimizer(named, mask=mask)
    train(opt, named, [1])
    kept = copy.deepcopy(mask)
    for entry in opt.state_dict()["state"].values():
        if "child" in entry:
            entry["child"].fill_(-1)
    assert mask == kept and opt.mask == kept


def test_hyper_parameters_that_a_state_changes_are_told():
    named = model()
    opt = optimizer(named, reserve_p=0.3, seed=9)
    train(opt, named, [1])
    with pytest.warns(UserWarning, match=r"from the state.*reserve_p 0.3 \(here 0.9\), seed 9 \(here 1\)"):
        optimizer(model(), reserve_p=0.9, seed=1).load_state_dict(opt.state_dict())


# ---- torch.distributed.checkpoint: it probes with zero gradients, lr 0 and no state, and loads in place -------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(9, 8), nn.Linear(8, 4)

    def loss(self, t: int):
        x = torch.randn(5, 9, generator=torch.Generator().manual_seed(t))
        return self.head(self.body(x).tanh()).square().mean()


def net_mask(seed: int = 0) -> ChildMask:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(72, generator=generator).view(8, 9)  # as many weights, whatever the seed
    return ChildMask.from_dense({"body.weight": order < 30})


OPTIONS = {
    "plain": lambda: {},
    "F": lambda: dict(reserve_p=0.5),
    "D": lambda: dict(mask=net_mask()),
    "D, packed gradients": lambda: dict(mask=net_mask(), pack_gradients=True, max_grad_norm=math.inf),
    "D, in backward": lambda: dict(mask=net_mask(), fused_backward=True, max_grad_norm=math.inf),
    "in backward": lambda: dict(fused_backward=True, max_grad_norm=math.inf),
}


def run(net, opt, steps):
    for t in steps:
        net.loss(t).backward()
        opt.step()
        opt.zero_grad()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_distributed_checkpoint_goes_on_bit_for_bit(options, tmp_path):
    net = Net()
    opt = ChildAdamW(net.named_parameters(), lr=0.1, **options())
    run(net, opt, [1, 2, 3])
    dcp.save({"optimizer": get_optimizer_state_dict(net, opt)}, checkpoint_id=tmp_path)
    other = Net()
    other.load_state_dict(net.state_dict())
    fresh = ChildAdamW(other.named_parameters(), lr=0.1, **options())
    before = snapshot(other.parameters())
    state = get_optimizer_state_dict(other, fresh)  # takes the probing step
    assert unchanged(before, list(other.parameters()))
    dcp.load({"optimizer": state}, checkpoint_id=tmp_path)
    set_optimizer_state_dict(other, fresh, state)
    run(net, opt, [4, 5])
    run(other, fresh, [4, 5])
    pairs = [(list(n.named_parameters()), o) for n, o in ((net, opt), (other, fresh))]
    assert same_training(*pairs[0], *pairs[1])


def test_a_distributed_checkpoint_of_another_child_is_refused_and_overwrites_no_mask(tmp_path):
    net = Net()
    opt = ChildAdamW(net.named_parameters(), lr=0.1, mask=net_mask(1))
    run(net, opt, [1])
    dcp.save({"optimizer": get_optimizer_state_dict(net, opt)}, checkpoint_id=tmp_path)
    other, mask = Net(), net_mask(2)
    fresh = ChildAdamW(other.named_parameters(), lr=0.1, mask=mask)
    state = get_optimizer_state_dict(other, fresh)
    dcp.load({"optimizer": state}, checkpoint_id=tmp_path)
    assert mask == net_mask(2) and fresh.mask == net_mask(2)
    with pytest.raises(ValueError, match="must be of this optimizer's mask, got \"another mask's\""):
        set_optimizer_state_dict(other, fresh, state)


# ---- counters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_steps_go_on_beyond_those_of_float32(kind, place):
    first = 2**24 - 2
    named, reference = model(place.device), model()
    opts = optimizer(named, kind, impl=place.impl), optimizer(reference, kind, impl="reference")
    for opt, parameters in zip(opts, (named, reference), strict=True):
        train(opt, parameters, [1])
        for entry in opt.state.values():
            entry["step"].fill_(first)
        train(opt, parameters, range(2, 7))
    assert unchanged(weights_of(reference), weights_of(named)) and unchanged(state_of(opts[1]), state_of(opts[0]))
    assert all(entry["step"].item() == first + 5 for entry in opts[0].state.values())
    assert all(w.isfinite().all() for w in weights_of(named))


def test_masks_and_bias_corrections_of_late_steps(place):
    """Against fp64, with moments as if 2**24 steps had been taken; masks differ from step to step."""
    weight = torch.randn(300, generator=torch.Generator().manual_seed(1))
    param = nn.Parameter(weight.clone().to(place.device))
    opt = ChildAdamW([("w", param)], lr=0.1, betas=(0.9, 1 - 2**-26), reserve_p=0.5, seed=3, impl=place.impl)
    param.grad = torch.zeros_like(param)
    opt.step()
    opt.state[param]["step"].fill_(2**24 - 1)
    truth, eager = Oracle(param.detach().cpu()), Oracle(param.detach().cpu(), dtype=torch.float32)
    for oracle in (truth, eager):
        oracle.t = 2**24 - 1
    masks = []
    for t in range(2**24, 2**24 + 4):
        grad = torch.randn(300, generator=torch.Generator().manual_seed(t))
        param.grad = grad.to(place.device)
        opt.step()
        masks.append(philox.mask_at("w", (300,), seed=3, step=t, p=0.5))
        for oracle in (truth, eager):
            oracle.step(grad, lr=0.1, betas=(0.9, 1 - 2**-26), keep=masks[-1], p=0.5)
        assert torch.equal(opt.mask_at(t, "w").cpu(), masks[-1])
    assert_as_accurate(param.detach(), truth.w, eager.w)
    assert not any(torch.equal(a, b) for a, b in zip(masks, masks[1:], strict=False))


def test_the_last_steps_of_the_stream(place):
    """Nothing begins again at 2**32: the last step is repeated, on every implementation alike."""
    named, reference = model(place.device), model()
    opts = optimizer(named, "F", impl=place.impl), optimizer(reference, "F", impl="reference")
    for opt, parameters in zip(opts, (named, reference), strict=True):
        train(opt, parameters, [1])
        for entry in opt.state.values():
            entry["step"].fill_(2**32 - 3)
        train(opt, parameters, range(2, 7))
    assert unchanged(weights_of(reference), weights_of(named))
    assert all(w.isfinite().all() for w in weights_of(named))


@pytest.mark.parametrize("step", [2.0**24 + 1, 2.0**32 - 1])
def test_late_states_are_exchanged_with_torch(step):
    named, theirs = model(), model()
    ours, adamw = optimizer(named), torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1)
    for opt, parameters in ((ours, named), (adamw, theirs)):
        train(opt, parameters, [1])
        for entry in opt.state.values():
            entry["step"] = torch.tensor(step, dtype=torch.float64)
    back, forth = optimizer(model()), torch.optim.AdamW(model(), lr=1e-2)
    back.load_state_dict(copy.deepcopy(adamw.state_dict()))
    forth.load_state_dict(copy.deepcopy(ours.state_dict()))
    for opt in (back, forth):
        assert {entry["step"].item() for entry in opt.state.values()} == {step}
    dense = ours.dense_state_dict()["state"]  # as torch has it, to the last bit
    assert {entry["step"].dtype for entry in dense.values()} == {torch.float32}


@pytest.mark.parametrize("step", [-1.0, 0.5, math.nan, math.inf, 2.0**32], ids=str)
def test_states_with_impossible_counters_are_refused(step):
    named = model()
    opt = optimizer(named, "F")
    train(opt, named, [1])
    state = copy.deepcopy(opt.state_dict())
    state["state"][2]["step"] = torch.tensor(step, dtype=torch.float64)
    before = weights_of(named) + snapshot(state_of(opt))
    with pytest.raises(ValueError, match=r"step of parameter 2 must be in \[0, 2\*\*32\)"):
        opt.load_state_dict(state)
    assert unchanged(before, weights_of(named) + state_of(opt))


@pytest.mark.parametrize("step", [3, 3.0, torch.tensor(3), torch.tensor([3.0])], ids=str)
def test_counters_put_in_as_torch_has_them_are_taken(step, place):
    named, twins = model(place.device), model(place.device)
    opts = optimizer(named, "F", impl=place.impl), optimizer(twins, "F", impl=place.impl)
    for opt, parameters in zip(opts, (named, twins), strict=True):
        train(opt, parameters, [1, 2, 3])
    for entry in opts[0].state.values():
        entry["step"] = step.clone() if isinstance(step, torch.Tensor) else step
    for opt, parameters in zip(opts, (named, twins), strict=True):
        train(opt, parameters, [4])
    assert same_training(named, opts[0], twins, opts[1])


@pytest.mark.parametrize("key", ["step", "exp_avg", "exp_avg_sq"])
def test_an_entry_that_lost_a_tensor_is_refused(key):
    named = model()
    opt = optimizer(named)
    train(opt, named, [1])
    del opt.state[named[1][1]][key]
    before = weights_of(named)
    set_grads(named, 2)
    with pytest.raises(RuntimeError, match=f"state of 'layer.weight' must hold .*, got no {key}"):
        opt.step()
    assert unchanged(before, weights_of(named))


@pytest.mark.parametrize("kind", KINDS)
def test_a_cleared_entry_starts_anew(kind, place):
    """As in torch.optim: step 1, moments 0, masters from the weights."""
    named = model(place.device, torch.bfloat16)
    opt = optimizer(named, kind, impl=place.impl)
    train(opt, named, [1, 2])
    param = dict(named)["head.weight"]
    opt.state[param].clear()
    fresh = [("head.weight", nn.Parameter(param.detach().clone()))]
    mask = {"mask": ChildMask.from_dense({"head.weight": child_mask().to_dense("head.weight")})} if "D" in kind else {}
    other = optimizer(fresh, kind, impl=place.impl, **mask)
    set_grads(named, 3)
    fresh[0][1].grad = param.grad.clone()
    opt.step(), other.step()
    assert unchanged([param], [fresh[0][1]]) and opt.state[param]["step"].item() == 1


# ---- weights replaced behind the optimizer --------------------------------------------------------------------------


def _by_load_state_dict(param, new):
    holder = nn.Module()
    holder.w = param
    holder.load_state_dict({"w": new})


REPLACE = {
    "load_state_dict": _by_load_state_dict,
    "data.copy_": lambda param, new: param.data.copy_(new),
    "data": lambda param, new: setattr(param, "data", new.clone()),
}


@pytest.mark.parametrize("replace", REPLACE.values(), ids=REPLACE)
@pytest.mark.parametrize("kind", ["plain", "F", "D", "F in D"])
@pytest.mark.parametrize("low", ["master", "kahan"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_replaced_weights_count_and_the_others_keep_what_they_have(dtype, low, kind, replace, place):
    """As `load_best_model_at_end` does it: a step of lr 0 leaves them, and training goes on from them."""
    named = model(place.device, dtype)
    opt = optimizer(named, kind, low_precision=low, impl=place.impl)
    train(opt, named, [1, 2, 3])
    param = dict(named)["head.weight"]
    new = param.detach().clone()
    new[1] = (new[1].float() / 64).to(dtype)  # the other rows stay; what these lack is now too much
    replace(param, new)
    twin = [(name, nn.Parameter(p.detach().clone())) for name, p in named]
    other = optimizer(twin, kind, low_precision=low, impl=place.impl)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    entry = other.state[dict(twin)["head.weight"]]
    key = "master" if low == "master" else "compensation"
    inside = child_mask().to_dense("head.weight").to(place.device) if "D" in kind else torch.ones_like(new).bool()
    row = torch.zeros_like(inside)
    row[1] = True
    held = entry[key].view(-1)
    where = row[inside] if "D" in kind else row.view(-1)
    truth = new.float()[inside] if "D" in kind else new.float().view(-1)
    if low == "kahan":  # what still rounds to the weight stays, within half a unit of it
        again = (truth.double() + held.double()).to(dtype).float()
        where = where & (again != truth)
        assert 100 < where.sum()
    held[where] = truth[where].to(held.dtype) if low == "master" else 0
    for group in opt.param_groups + other.param_groups:
        group["lr"] = 0.0
    before = weights_of(named)
    for o, parameters in ((opt, named), (other, twin)):
        train(o, parameters, [4])
    assert unchanged(before, weights_of(named))
    for group in opt.param_groups + other.param_groups:
        group["lr"] = 1e-2
    for o, parameters in ((opt, named), (other, twin)):
        train(o, parameters, [5, 6])
    assert same_training(named, opt, twin, other)
