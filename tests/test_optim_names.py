"""Names and groups: parameters keep theirs when they are wrapped or moved, or the step is refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from cases import child_mask, model, optimizer, set_grads, state_of, train, unchanged, weights_of
from torch import nn

from childtune_kernels import ChildAdamW, ChildMask


def wrapped(named, pattern: str):
    return [(pattern.format(name), param) for name, param in named]


PATTERNS = ("_orig_mod.{}", "module.{}", "module._orig_mod.{}", "_orig_mod.module.{}", "_fsdp_wrapped_module.{}")


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", ["F", "D", "F in D"])
def test_a_wrapped_model_trains_as_the_bare_one(kind, pattern):
    bare, other = model(), model()
    opts = optimizer(bare, kind), optimizer(wrapped(other, pattern), kind)
    for named, opt in zip((bare, other), opts, strict=True):
        train(opt, named, [1, 2])
    assert unchanged(weights_of(bare), weights_of(other)) and unchanged(state_of(opts[0]), state_of(opts[1]))
    assert opts[0].state_dict()["param_groups"] == opts[1].state_dict()["param_groups"]
    for asked in ("head.weight", pattern.format("head.weight")):
        assert torch.equal(opts[1].mask_at(2, asked), opts[0].mask_at(2, "head.weight"))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_checkpoint_goes_between_wrapped_and_bare(pattern):
    bare, other = model(), model()
    opt = optimizer(wrapped(other, pattern), "F in D")
    train(opt, other, [1, 2])
    saved = opt.state_dict()
    saved["param_groups"][0]["param_names"] = [name for name, _ in wrapped(bare, pattern)]  # as older versions wrote
    fresh = optimizer(bare, "F in D")
    fresh.load_state_dict(saved)
    assert fresh.param_groups[0]["param_names"] == [name for name, _ in bare]
    assert torch.equal(fresh.mask_at(3, "head.weight"), opt.mask_at(3, "head.weight"))


def test_an_optimizer_without_names_takes_those_of_a_state():
    """... as torch does with `param_names`; F's masks are then those of the run that goes on."""
    named, bare = model(), [p for _, p in model()]
    opt, resumed = optimizer(named, "F"), optimizer(bare, "F")
    train(opt, named, [1, 2])
    train(resumed, list(enumerate(bare)), [7])
    for (_, param), other in zip(named, bare, strict=True):
        other.data.copy_(param.data)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert [name for _, name, _ in resumed.members()] == [name for name, _ in named]
    train(opt, named, [3, 4])
    train(resumed, list(enumerate(bare)), [3, 4])
    assert unchanged(weights_of(named), bare)


def test_a_compiled_model_really_compiled():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    twin = copy.deepcopy(net)
    compiled = torch.compile(net, backend="eager")
    for own, used in ((net, compiled), (twin, twin)):
        opt = ChildAdamW(used.named_parameters(), reserve_p=0.5, lr=0.1)
        used(torch.ones(3, 8)).sum().backward()
        opt.step()
        own.mask = opt.mask_at(1, "0.weight")
    assert torch.equal(net.mask, twin.mask) and unchanged(list(net.parameters()), list(twin.parameters()))


def test_the_wrapper_of_the_first_names_is_taken_off_later_ones():
    """... and a group added later cannot rename the first ones."""
    named = model()
    opt = optimizer(wrapped(named[:3], "module.{}"), "F")
    before = opt.mask_at(1, "embed.weight")
    opt.add_param_group({"params": wrapped(named[3:4], "module.{}")})
    opt.add_param_group({"params": named[4:]})
    assert [name for _, name, _ in opt.members()] == [name for name, _ in named]
    assert torch.equal(opt.mask_at(1, "embed.weight"), before)
    with pytest.raises(ValueError, match="a name not used before"):
        opt.add_param_group({"params": [("module.embed.weight", nn.Parameter(torch.ones(2)))]})


def test_names_that_become_one_are_refused():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="names must differ"):
        ChildAdamW([("a._orig_mod.w", p), ("a.w", q)])


# ---- moved between groups -------------------------------------------------------------------------------------------


def _groups(make, named, **kwargs):
    parts = [{"params": named[:3], "lr": 0.1}, {"params": named[3:], "lr": 0.001}]
    return make(parts, weight_decay=0.0, **kwargs)


MOVES = {
    "to the next group": lambda groups: groups[1]["params"].insert(0, groups[0]["params"].pop()),
    "to the end": lambda groups: groups[1]["params"].append(groups[0]["params"].pop(0)),
    "swapped": lambda groups: groups.reverse(),
    "within": lambda groups: groups[0]["params"].reverse(),
    "emptied and removed": lambda groups: (groups[1]["params"].extend(groups[0]["params"]), groups.pop(0)),
}


@pytest.mark.parametrize("named", [True, False], ids=["names", "positions"])
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_moved_parameters_take_their_new_groups_hyper_parameters(move, named, place):
    """As in torch.optim."""
    trained = []
    for make, kwargs in ((torch.optim.AdamW, {}), (ChildAdamW, {"impl": place.impl})):
        params = model(place.device)
        opt = _groups(make, params if named else [p for _, p in params], **kwargs)
        if not named:
            opt = make(
                [{"params": [p for _, p in params[:3]], "lr": 0.1}, {"params": [p for _, p in params[3:]], "lr": 1e-3}],
                weight_decay=0.0, **kwargs,
            )  # fmt: skip
        train(opt, params, [1])
        move(opt.param_groups)
        train(opt, params, [2, 3])
        trained.append(params)
    for (_, ours), (_, theirs) in zip(*reversed(trained), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("kind", ["F", "D", "F in D"])
def test_masks_follow_named_parameters_to_other_groups(kind, move, place):
    stay, go = model(place.device), model(place.device)
    opts = []
    for named in (stay, go):
        opts.append(optimizer([{"params": named[:3]}, {"params": named[3:]}], kind, impl=place.impl))
        train(opts[-1], named, [1])
    move(opts[1].param_groups)
    for named, opt in zip((stay, go), opts, strict=True):
        train(opt, named, [2, 3])
    assert unchanged(weights_of(stay), weights_of(go))
    for param_name, param in go:
        group = next(g for g in opts[1].state_dict()["param_groups"] if param_name in g["param_names"])
        own = next(g for g in opts[1].param_groups if any(p is param for p in g["params"]))
        assert group["param_names"].index(param_name) == next(i for i, p in enumerate(own["params"]) if p is param)


@pytest.mark.parametrize("kind", ["F", "D"])
def test_masks_by_position_refuse_moved_parameters(kind, place):
    params = [p for _, p in model(place.device)]
    options = dict(reserve_p=0.5) if kind == "F" else dict(mask=ChildMask.from_dense({"0": torch.ones(7, 5).bool()}))
    opt = ChildAdamW([{"params": params[:3]}, {"params": params[3:]}], impl=place.impl, **options)
    set_grads(list(enumerate(params)), 1)
    opt.step()
    opt.param_groups[1]["params"].append(opt.param_groups[0]["params"].pop(1))
    before = weights_of(list(enumerate(params)))
    with pytest.raises(RuntimeError, match="positions, which must stay; moved: .*pass model.named_parameters"):
        opt.step()
    assert unchanged(before, params)
    opt.param_groups[0]["params"].insert(1, opt.param_groups[1]["params"].pop())
    opt.step()  # back in place


def test_a_parameter_without_a_name_among_named_ones_is_refused():
    named = model()
    opt = optimizer(named, "F")
    extra = nn.Parameter(torch.ones(3))
    opt.param_groups[0]["params"].append(extra)
    set_grads(named, 1)
    extra.grad = torch.ones(3)
    with pytest.raises(ValueError, match="params must be added by add_param_group, with a name"):
        opt.step()


@pytest.mark.parametrize("make", [set, frozenset, lambda ps: [{"params": set(ps)}]])
def test_unordered_parameters_are_refused(make):
    params = [p for _, p in model()]
    with pytest.raises(TypeError, match="params must be in order, .* got a set"):
        ChildAdamW(make(params))


def test_any_ordered_container_is_taken():
    for make in (tuple, iter, lambda ps: (p for p in ps), lambda ps: dict.fromkeys(ps).keys()):
        assert len(ChildAdamW(make([p for _, p in model()])).param_groups[0]["params"]) == 5
    with pytest.raises((TypeError, ValueError)):
        ChildAdamW(torch.ones(3))
    with pytest.raises(ValueError, match="empty parameter list"):
        ChildAdamW([])


# ---- errors and tables ----------------------------------------------------------------------------------------------


def test_errors_about_names_stay_readable():
    many = {f"layer.{i}.weight": torch.ones(3, dtype=torch.bool) for i in range(400)}
    with pytest.raises(ValueError) as caught:
        ChildAdamW([p for _, p in model()], mask=ChildMask.from_dense(many))
    message = str(caught.value)
    assert "'layer.0.weight'" in message and "390 more" in message and "model.named_parameters()" in message
    assert len(message) < 600
    with pytest.raises(KeyError, match="embed.weight"):
        optimizer(model(), "F").mask_at(1, "nothing")


def test_a_table_does_not_count_frozen_parameters():
    named = model()
    for name, param in named:
        param.requires_grad_("head" in name)
    opt = optimizer(named, "D")
    first = opt.describe().splitlines()[1].split()
    head = child_mask().count("head.weight")
    assert first[1:4] == ["1", f"{3 * 1031:,}", f"{head:,}"]
    assert f"frozen: 4 tensors of {7 * 5 + 33 * 31 + 33 + 1:,} weights" in opt.describe()


# ---- how 16-bit weights are kept: chosen again when what it depends on changes ---------------------------------------


def test_low_precision_is_chosen_anew_where_nothing_was_asked():
    named = model(dtype=torch.bfloat16)
    opt = optimizer(named)
    assert opt.low_precision == "nearest"
    opt.set_mask(child_mask())
    assert opt.low_precision == "master"
    train(opt, named, [1])
    assert all("master" in entry for entry in opt.state.values())
    opt.set_mask(None)
    assert opt.low_precision == "nearest"
    train(opt, named, [2])
    assert not any("master" in entry for entry in opt.state.values())
    opt.param_groups[0]["reserve_p"] = 0.5
    assert opt.low_precision == "stochastic"
    asked = optimizer(model(dtype=torch.bfloat16), low_precision="kahan")
    asked.set_mask(child_mask())
    assert asked.low_precision == "kahan"


@pytest.mark.parametrize("ps", [(0.5, 1.0), (1.0, 0.5)])
def test_one_random_group_is_enough_for_stochastic_rounding(ps):
    named = model(dtype=torch.bfloat16)
    groups = [{"params": named[:2], "reserve_p": ps[0]}, {"params": named[2:], "reserve_p": ps[1]}]
    assert ChildAdamW(groups).low_precision == "stochastic"
    opt = ChildAdamW(named[:2])
    opt.add_param_group({"params": named[2:], "reserve_p": 0.5})
    assert opt.low_precision == "stochastic"


# ---- trainers -------------------------------------------------------------------------------------------------------


def test_who_unscales_is_said_to_trainers():
    """Lightning refuses to clip for an optimizer that unscales by itself; GradScaler goes either way."""
    named = model()
    assert not getattr(optimizer(named), "_step_supports_amp_scaling", False)
    assert optimizer(named, max_grad_norm=1.0)._step_supports_amp_scaling
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for option in ("pack_gradients", "fused_backward"):
            hooked = optimizer(model(), "D", max_grad_norm=float("inf"), **{option: True})
            assert hooked._step_supports_amp_scaling
            assert copy.deepcopy(hooked)._step_supports_amp_scaling
