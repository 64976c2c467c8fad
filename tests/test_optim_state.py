"""ChildAdamW's state: saving, resuming to the bit, exchange with torch.optim.AdamW, refusals that change nothing."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from cases import (
    DTYPES,
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
from oracles import assert_as_accurate

from childtune_kernels import ChildAdamW


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def reloaded(named, opt, kind, **kwargs):
    """A new model and optimizer that continue from a file."""
    weights, state = through_a_file(([p.detach() for _, p in named], opt.state_dict()))
    fresh = [(name, torch.nn.Parameter(w)) for (name, _), w in zip(named, weights, strict=True)]
    new = optimizer(fresh, kind, **kwargs)
    new.load_state_dict(state)
    return fresh, new


@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_resuming_equals_never_stopping(kind, every, dtype, place):
    kwargs = dict(impl=place.impl)
    straight, resumed = model(place.device, dtype), model(place.device, dtype)
    opt, other = optimizer(straight, kind, **kwargs), optimizer(resumed, kind, **kwargs)
    for t in range(1, 11):
        train(opt, straight, [t])
        train(other, resumed, [t])
        if t % every == 0:
            resumed, other = reloaded(resumed, other, kind, **kwargs)
    assert same_training(straight, opt, resumed, other)
    assert torch.equal(opt.mask_at(11, "layer.weight"), other.mask_at(11, "layer.weight"))


@pytest.mark.parametrize("state_dtype", DTYPES, ids=["m32", "mbf16", "m16"])
def test_a_round_trip_changes_no_bit(state_dtype, dtype):
    """torch would cast fp32 moments to the dtype of the weights; the values here do not survive that."""
    named = model(dtype=dtype)
    opt = optimizer(named, "F", state_dtype=state_dtype)
    train(opt, named, [1, 2, 3])
    _, other = reloaded(named, opt, "F", state_dtype=state_dtype)
    before, after = state_of(opt), state_of(other)
    assert unchanged(before, after) and all(a.data_ptr() != b.data_ptr() for a, b in zip(before, after, strict=True))
    assert {x.dtype for x in after} == {state_dtype, torch.float64}  # moments and step counters
    if dtype == torch.bfloat16 and state_dtype == torch.float32:
        assert not unchanged(before, [x.bfloat16().float() for x in before])


def test_loading_copies_and_keeps_the_state_dict():
    named, source = model(), model()
    opt = optimizer(source, "F")
    train(opt, source, [1])
    saved = opt.state_dict()
    expected = copy.deepcopy(saved)
    other = optimizer(named, "F")
    other.load_state_dict(saved)
    train(other, named, [2, 3])
    assert saved["param_groups"] == expected["param_groups"]
    for index, entry in saved["state"].items():
        assert unchanged(entry.values(), expected["state"][index].values()), "training after a load wrote into it"


def test_seed_and_hyper_parameters_come_from_the_state():
    source, named = model(), model()
    opt = optimizer([{"params": source[:2]}, {"params": source[2:], "reserve_p": 0.6, "seed": 99, "lr": 0.5}], "F")
    train(opt, source, [1])
    other = optimizer([{"params": named[:2]}, {"params": named[2:]}], reserve_p=0.9, seed=1, lr=1.0)
    other.load_state_dict(opt.state_dict())
    for key in ("reserve_p", "seed", "lr", "weight_decay"):
        assert [g[key] for g in other.param_groups] == [g[key] for g in opt.param_groups]
    assert torch.equal(other.mask_at(7, "head.weight"), opt.mask_at(7, "head.weight"))


def test_loading_before_the_first_step_and_into_a_running_optimizer():
    source, fresh, running = model(), model(), model()
    opt = optimizer(source, "F")
    empty = copy.deepcopy(opt.state_dict())
    train(opt, source, [1, 2])
    opts = [optimizer(fresh, "F"), optimizer(running, "F")]
    train(opts[1], running, [7, 8, 9])
    for other, named in zip(opts, (fresh, running), strict=True):
        other.load_state_dict(opt.state_dict())
        for (_, param), (_, source_param) in zip(named, source, strict=True):
            param.data.copy_(source_param.data)
        train(other, named, [3])
    train(opt, source, [3])
    assert same_training(source, opt, fresh, opts[0]) and same_training(source, opt, running, opts[1])
    opt.load_state_dict(empty)
    assert not opt.state


def test_users_hooks_run_around_loading():
    source, named = model(), model()
    opt = optimizer(source)
    train(opt, source, [1])
    other, seen = optimizer(named), []

    def halve(_, state):
        state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"] / 2
        return state

    other.register_load_state_dict_pre_hook(halve)
    other.register_load_state_dict_post_hook(lambda o: seen.append(o.state[named[0][1]]["exp_avg"].clone()))
    saved = copy.deepcopy(opt.state_dict())
    other.load_state_dict(saved)
    assert torch.equal(seen[0], opt.state[source[0][1]]["exp_avg"] / 2)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert len(seen) == 2, "hooks used while loading must not pile up"


# ---- exchange with torch.optim.AdamW --------------------------------------------------------------------------------


def _torch_adamw(named, **kwargs):
    return torch.optim.AdamW(named, lr=1e-2, weight_decay=0.1, foreach=False, **kwargs)


@pytest.mark.parametrize("named_params", [True, False], ids=["names", "positions"])
def test_state_from_torchs_adamw_and_on(named_params, place):
    """Three steps with torch, three with ours: as accurate as six with torch."""
    weights = {}
    for which in ("ours", "fp64", "fp32"):
        device = place.device if which == "ours" else "cpu"
        named = model(device, torch.float64 if which == "fp64" else torch.float32)
        opt = _torch_adamw(named if named_params else [p for _, p in named])
        train(opt, named, [1, 2, 3])
        if which == "ours":
            state = through_a_file(opt.state_dict())
            opt = optimizer(named, lr=7.0, impl=place.impl)
            opt.load_state_dict(state)
            assert opt.param_groups[0]["lr"] == 1e-2 and opt.param_groups[0]["reserve_p"] == 1.0
        train(opt, named, [4, 5, 6])
        assert all(opt.state[p]["step"].item() == 6 for _, p in named)
        weights[which] = weights_of(named)
    for ours, truth, eager in zip(*weights.values(), strict=True):
        assert_as_accurate(ours, truth, eager, ulps=6)


@pytest.mark.parametrize("named_params", [True, False], ids=["names", "positions"])
def test_state_to_torchs_adamw_and_on(named_params, place):
    weights = {}
    for which in ("ours", "fp64", "fp32"):
        device = place.device if which == "ours" else "cpu"
        named = model(device, torch.float64 if which == "fp64" else torch.float32)
        params = named if named_params else [p for _, p in named]
        opt = optimizer(params, impl=place.impl) if which == "ours" else _torch_adamw(params)
        train(opt, named, [1, 2, 3])
        if which == "ours":
            state = through_a_file(opt.state_dict())
            opt = _torch_adamw(params)
            opt.load_state_dict(state)
        train(opt, named, [4, 5, 6])
        weights[which] = weights_of(named)
    for ours, truth, eager in zip(*weights.values(), strict=True):
        assert_as_accurate(ours, truth, eager, ulps=6)


def test_the_state_has_torchs_keys():
    named = model()
    opt, adamw = optimizer(named), _torch_adamw(named)
    train(opt, named, [1])
    train(adamw, named, [1])
    for _, param in named:
        assert opt.state[param].keys() == adamw.state[param].keys()
        for key, value in adamw.state[param].items():
            dtype = torch.float64 if key == "step" else value.dtype  # torch's float32 stands still from step 2**24 on
            assert opt.state[param][key].shape == value.shape and opt.state[param][key].dtype == dtype


@pytest.mark.parametrize("step", [3, 3.0, torch.tensor(3), torch.tensor([3.0]), torch.tensor(3.0).double()], ids=str)
def test_step_counts_of_any_kind_are_read(step):
    named = model()
    opt = optimizer(named)
    train(opt, named, [1])
    state = opt.state_dict()
    state["state"][0]["step"] = step
    other = optimizer(named)
    other.load_state_dict(state)
    got = other.state[named[0][1]]["step"]
    assert got.dtype == torch.float64 and got.shape == () and got.item() == 3


# ---- refusals -------------------------------------------------------------------------------------------------------


def _saved(**kwargs):
    named = model()
    opt = optimizer(named, "F", **kwargs)
    train(opt, named, [1, 2])
    return copy.deepcopy(opt.state_dict())


def _edit(path, value):
    def change(state):
        *parents, last = path
        for key in parents:
            state = state[key]
        state[last] = value(state[last]) if callable(value) else value

    return change


def _drop(state):
    del state["state"][1]["exp_avg_sq"]


def _foreign(make):
    def change(state):
        named = model()
        other = make([p for _, p in named])
        set_grads(named, 1)
        other.step()
        state.update(other.state_dict())

    return change


GROUP = ("param_groups", 0)
BAD_STATES = {
    "shape": (_edit(("state", 4, "exp_avg"), lambda v: v.t()), r"exp_avg of parameter 4 .* \(3, 1031\), got \(1031"),
    "second-shape": (_edit(("state", 2, "exp_avg_sq"), lambda v: v[:5]), r"exp_avg_sq of parameter 2 .* got \(5"),
    "group-size": (_edit((*GROUP, "params"), [0, 1, 2]), r"groups of \[5\] parameters, got 'groups of \[3\]'"),
    "groups": (_edit(("param_groups",), lambda v: v + v), r"groups of \[5\] parameters, got 'groups of \[5, 5\]'"),
    "version": (_edit((*GROUP, "mask_stream"), 2), "mask stream version 1, got 'version 2'"),
    "names": (_edit((*GROUP, "param_names"), lambda v: v[::-1]), "must be parameters named .* got"),
    "amsgrad": (_edit((*GROUP, "amsgrad"), True), "must be state without amsgrad, got"),
    "p": (_edit((*GROUP, "reserve_p"), 1.5), "reserve_p must be .* got 1.5"),
    "lr": (_edit((*GROUP, "lr"), -1.0), "lr must be at least 0, got -1.0"),
    "seed": (_edit((*GROUP, "seed"), -1), "seed must be an integer .* got -1"),
    "incomplete": (_drop, r"state of parameter 1 must be AdamW's .* got \['exp_avg', 'step'\]"),
    "sgd": (_foreign(lambda ps: torch.optim.SGD(ps, momentum=0.9)), r"must be AdamW's .* got \['momentum_buffer'\]"),
    "adagrad": (_foreign(torch.optim.Adagrad), r"must be AdamW's .* got \['step', 'sum'\]"),
    "amsgrad-run": (_foreign(lambda ps: torch.optim.AdamW(ps, amsgrad=True)), "state without amsgrad"),
}  # fmt: skip


def _refuses(opt, named, state, message):
    before = weights_of(named) + snapshot(state_of(opt))
    groups = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups])
    with pytest.raises((ValueError, TypeError), match=message):
        opt.load_state_dict(state)
    assert unchanged(before, weights_of(named) + state_of(opt))
    assert groups == [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]
    train(opt, named, [4])  # and it still trains


@pytest.mark.parametrize("change, message", BAD_STATES.values(), ids=BAD_STATES)
def test_bad_states_are_refused_and_change_nothing(change, message):
    named = model()
    opt = optimizer(named, "F", lr=0.3)
    train(opt, named, [3])
    state = _saved()
    change(state)
    _refuses(opt, named, state, message)
    untouched = model()
    other = optimizer(untouched, "F", lr=0.3)
    train(other, untouched, [3, 4])
    assert same_training(named, opt, untouched, other)


def test_f_state_is_refused_where_a_mask_is_given():
    named = model()
    opt = optimizer(named, "D, dense")
    train(opt, named, [1])
    _refuses(opt, named, _saved(), "reserve_p must be 1 where a mask is given.*, got 0.3")


def test_names_from_a_state_may_not_take_a_mask_away():
    """An optimizer without names looks its mask up by position; names in a state would silently train everything."""
    params = [p for _, p in model()]
    mask = {"0": child_mask().to_dense("embed.weight")}
    opt = ChildAdamW(params, mask=type(child_mask()).from_dense(mask))
    named = [(str(i), p) for i, p in enumerate(params)]
    train(opt, named, [1])
    plain = model()
    source = optimizer(plain)
    train(source, plain, [1])
    before = opt.mask_at(1, "0")
    _refuses(opt, named, copy.deepcopy(source.state_dict()), "must be .*parameters.*, got")
    assert torch.equal(opt.mask_at(1, "0"), before) and not before.all()
