"""State between masks, layouts and optimizers: what carries over, what starts afresh, what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import (
    MODEL,
    child_mask,
    model,
    moments_of,
    optimizer,
    same_training,
    snapshot,
    state_of,
    train,
    unchanged,
    weights_of,
)
from oracles import same_bits

from childtune_kernels import ChildAdamW, ChildMask

HALF = torch.bfloat16


def other_mask() -> ChildMask:
    """Overlaps with the usual one; one parameter leaves it, another comes, and one is wholly in it."""
    generator = torch.Generator().manual_seed(9)
    dense = {n: torch.rand(MODEL[n], generator=generator) < 0.5 for n in ("layer.weight", "head.weight")}
    return ChildMask.from_dense(dense | {"layer.bias": torch.ones(MODEL["layer.bias"], dtype=torch.bool)})


def trained(kind, dtype=torch.float32, device="cpu", steps=(1, 2, 3), **kwargs):
    named = model(device, dtype)
    opt = optimizer(named, kind, **kwargs)
    train(opt, named, steps)
    return named, opt


def into(kind, state, named, **kwargs):
    fresh = [(name, torch.nn.Parameter(p.detach().clone())) for name, p in named]
    opt = optimizer(fresh, kind, **kwargs)
    opt.load_state_dict(state)
    return fresh, opt


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["fp32", "bf16"])
@pytest.mark.parametrize("packing", [("D", "D, dense"), ("D, dense", "D")], ids=["packed-to-dense", "dense-to-packed"])
def test_packed_and_dense_go_on_alike(packing, dtype, place):
    """Training three steps in one layout and three in the other is training six in either."""
    kwargs = dict(impl=place.impl, low_precision="nearest")
    named, opt = trained(packing[0], dtype, place.device, **kwargs)
    named, opt = into(packing[1], copy.deepcopy(opt.state_dict()), named, **kwargs)
    train(opt, named, [4, 5, 6])
    straight, other = trained(packing[1], dtype, place.device, range(1, 7), **kwargs)
    assert same_training(straight, other, named, opt)


def test_packed_equals_dense_on_the_child(dtype, dialect, place):
    kwargs = dict(impl=place.impl, dialect=dialect, low_precision="nearest", max_grad_norm=0.7)
    runs = [trained(kind, dtype, place.device, range(1, 8), **kwargs) for kind in ("D", "D, dense")]
    assert unchanged(*(weights_of(named) for named, _ in runs))
    for (name, param), packed, dense in zip(runs[0][0], *(moments_of(opt) for _, opt in runs), strict=True):
        assert unchanged(packed, dense), name
        held = runs[0][1].state[param]["exp_avg"]
        expected = (child_mask().count(name),) if name in child_mask() else param.shape
        assert held.shape == expected


def test_only_the_childs_moments_exist():
    _, opt = trained("D")
    total = sum(t.numel() for t in state_of(opt)) - len(MODEL)
    inside = sum(child_mask().count(n) if n in child_mask() else torch.Size(s).numel() for n, s in MODEL.items())
    assert total == 2 * inside


@pytest.mark.parametrize("kind", ["plain", "F", "D", "D, dense"])
def test_from_and_to_torchs_adamw(kind):
    """Exported state is torch's own; what torch saves loads into every layout, the child's part of it."""
    named, opt = trained(kind, low_precision="nearest")
    exported = copy.deepcopy(opt.dense_state_dict())
    theirs = torch.optim.AdamW([(n, torch.nn.Parameter(p.detach().clone())) for n, p in named], lr=1e-2)
    theirs.load_state_dict(exported)
    for (m, v), entry in zip(moments_of(opt), theirs.state.values(), strict=True):
        assert same_bits(entry["exp_avg"], m) and same_bits(entry["exp_avg_sq"], v)
        assert entry.keys() == {"step", "exp_avg", "exp_avg_sq"}
    _, back = into(kind, theirs.state_dict(), named)
    assert unchanged(state_of(opt), state_of(back))


def test_d_state_into_full_fine_tuning_and_back():
    named, opt = trained("D")
    fresh, plain = into("plain", copy.deepcopy(opt.state_dict()), named)
    assert all(unchanged(a, b) for a, b in zip(moments_of(opt), moments_of(plain), strict=True))
    train(plain, fresh, [4])
    _, back = into("D", copy.deepcopy(plain.state_dict()), fresh)
    for name, packed, full in zip(MODEL, moments_of(back), moments_of(plain), strict=True):
        inside = child_mask().to_dense(name) if name in child_mask() else torch.ones(MODEL[name], dtype=torch.bool)
        assert unchanged(packed, [torch.where(inside, x, 0.0) for x in full])


def test_state_of_f_continues_inside_a_child():
    named, opt = trained("F")
    fresh, child = into("F in D", copy.deepcopy(opt.state_dict()), named)
    train(child, fresh, [4])
    assert child.param_groups[0]["reserve_p"] == 0.3
    expected = opt.mask_at(4, "head.weight") & child_mask().to_dense("head.weight")
    assert torch.equal(child.mask_at(4, "head.weight"), expected)


@pytest.mark.parametrize("kind", ["D", "D, dense"])
def test_state_of_another_mask_is_refused(kind):
    named, opt = trained(kind)
    saved = copy.deepcopy(opt.state_dict())
    dense = {n: child_mask().to_dense(n) for n in child_mask()}
    dense["head.weight"] = dense["head.weight"].roll(1)  # as many weights, in other places
    mask = ChildMask.from_dense(dense)
    fresh, other = into(kind, optimizer(model(), kind, mask=mask).state_dict(), named, mask=mask)
    train(other, fresh, [1])
    before = weights_of(fresh) + snapshot(state_of(other))
    with pytest.raises(ValueError, match="child of 'head.weight' must be of this optimizer's mask, got \"another"):
        other.load_state_dict(saved)
    assert unchanged(before, weights_of(fresh) + state_of(other))


def test_a_checkpoint_names_the_child():
    named, opt = trained("D")
    for index, (name, _) in enumerate(named):
        words = opt.state_dict()["state"][index].get("child")
        assert (words is not None) == (name in child_mask())
        assert words is None or torch.equal(words, child_mask().words(name))


@pytest.mark.parametrize("low_precision", ["master", "kahan", "nearest"])
@pytest.mark.parametrize("start", ["plain", "D", "D, dense"])
def test_a_new_mask_keeps_what_stays(start, low_precision, place):
    keeps = low_precision if start != "D, dense" else "nearest"
    named, opt = trained(start, HALF, place.device, impl=place.impl, low_precision=keeps)
    before, old = moments_of(opt), [dict(opt.state[p]) for _, p in named]
    weights = weights_of(named)
    opt.set_mask(other_mask())
    assert opt.mask == other_mask() and unchanged(weights, weights_of(named))
    for (name, param), now, then, entry in zip(named, moments_of(opt), before, old, strict=True):
        stays = torch.ones(param.shape, dtype=torch.bool)
        stays = stays & (other_mask().to_dense(name) if name in other_mask() else stays)
        assert unchanged(now, [torch.where(stays.to(x.device), x, 0.0) for x in then])
        assert opt.state[param]["step"].item() == 3
        if keeps == "master":
            master = opt.state[param]["master"]
            was = torch.zeros(param.shape)
            inside = child_mask().to_dense(name) if start == "D" and name in child_mask() else torch.ones_like(stays)
            was[inside] = entry["master"].cpu().flatten()
            was[~inside] = param.detach().float().cpu()[~inside]  # new: as the weight is
            expected = was[stays] if name in other_mask() else was
            assert same_bits(master.flatten(), expected.flatten())
    train(opt, named, [4, 5])
    kept = {}
    for (name, param), weight in zip(named, weights, strict=True):
        kept[name] = torch.where(child_outside(name, param), weight, param)
    opt.assert_frozen(kept)


def child_outside(name, param):
    mask = other_mask()
    outside = ~mask.to_dense(name) if name in mask else torch.zeros(param.shape, dtype=torch.bool)
    return outside.to(param.device)


def test_without_a_mask_everything_trains_again():
    named, opt = trained("D")
    before = moments_of(opt)
    opt.set_mask(None)
    assert opt.mask is None and opt.config.packing is None
    assert all(unchanged(a, b) for a, b in zip(before, moments_of(opt), strict=True))
    weights = weights_of(named)
    train(opt, named, [4])
    assert all((a != b).all() for a, b in zip(weights, weights_of(named), strict=True))


def test_bad_masks_change_nothing():
    named, opt = trained("D")
    before = snapshot(state_of(opt))
    bad = ChildMask.from_dense({"pooler": torch.ones(3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="names only this optimizer's parameters"):
        opt.set_mask(bad)
    with pytest.raises(ValueError, match=r"mask of 'layer.bias' must be of shape \(33,\), got \(3,\)"):
        opt.set_mask(ChildMask.from_dense({"layer.bias": torch.ones(3, dtype=torch.bool)}))
    assert unchanged(before, state_of(opt)) and opt.mask == child_mask()
    _, decaying = trained("D, decay all")
    with pytest.raises(ValueError, match="decay must be 'child' where the mask changes, got 'all'"):
        decaying.set_mask(other_mask())


def test_pending_packed_gradients_are_not_lost_by_a_new_mask():
    layer = torch.nn.Linear(4, 4)
    mask = ChildMask.from_dense({"weight": torch.eye(4).bool()})
    opt = ChildAdamW(layer.named_parameters(), mask=mask, pack_gradients=True)
    layer(torch.ones(1, 4)).sum().backward()
    with pytest.raises(ValueError, match=r"set_mask must be called after step\(\) and zero_grad\(\)"):
        opt.set_mask(~mask)
    opt.step()
    opt.zero_grad()
    opt.set_mask(~mask)
    layer(torch.ones(1, 4)).sum().backward()
    opt.step()
    assert opt.state[layer.weight]["exp_avg"].shape == (12,)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["fp32", "bf16"])
def test_assert_frozen(dtype):
    named = model(dtype=dtype)
    pretrained = {name: p.detach().clone() for name, p in named}
    opt = optimizer(named, "D")
    train(opt, named, range(1, 6))
    opt.assert_frozen(pretrained)
    outside = (~child_mask().to_dense("head.weight")).nonzero()[0].tolist()
    with torch.no_grad():
        named[4][1][tuple(outside)] *= -1
    with pytest.raises(AssertionError, match=r"outside the child .*\{'head.weight': 1\}"):
        opt.assert_frozen(pretrained)
    with pytest.raises(ValueError, match="reference of 'embed.weight' must be .*, got 'nothing'"):
        opt.assert_frozen({})
    with pytest.raises(ValueError, match="mask must be a ChildMask"):
        optimizer(model(), "F").assert_frozen(pretrained)
