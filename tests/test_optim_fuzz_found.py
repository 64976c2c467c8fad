"""What random histories of an optimizer have found, each as short as it is."""

from __future__ import annotations

import pytest
import torch
from cases import KINDS, model, optimizer, same_training, set_grads, snapshot, state_of, train, unchanged, weights_of

from childtune_kernels import ChildAdamW


@pytest.mark.parametrize("by_hand", [True, False], ids=["by hand", "backward"])
@pytest.mark.parametrize("rows", [1, 6])
def test_packed_gradients_of_another_shape_are_refused(by_hand, rows, place):
    """The child's indices would reach beyond them: kernels read whatever lies there."""
    named = model(place.device)
    opt = optimizer(named, "D", impl=place.impl, pack_gradients=True, max_grad_norm=1.0)
    train(opt, named, [1, 2])
    head = dict(named)["head.weight"]
    good = head.data
    head.data = torch.cat([good, good])[:rows]
    before = snapshot([good, *state_of(opt)])
    with pytest.raises(ValueError, match=r"mask of 'head.weight' must be of shape"):
        if by_hand:
            head.grad = torch.ones_like(head)
        else:
            head.sum().backward()
        opt.step()
    assert unchanged(before, [good, *state_of(opt)])


@pytest.mark.parametrize("kind", ["D", "D, dense"])
def test_frozen_weights_are_proven_whatever_their_sign_bit(kind, place):
    """A view may keep its sign beside the bits, and so may the reference."""
    named = model(place.device)
    opt = optimizer(named, kind, impl=place.impl)
    for _, param in named:
        param.data = torch._neg_view(-param.data)
    reference = {name: torch._neg_view(-param.detach()) for name, param in named}
    opt.assert_frozen(reference)
    train(opt, named, [1])
    opt.assert_frozen(reference)
    with torch.no_grad():
        dict(named)["embed.weight"].add_(1)
    with pytest.raises(AssertionError, match="embed.weight"):
        opt.assert_frozen(reference)


@pytest.mark.parametrize("key, bad", [("seed", 0.5), ("seed", -1), ("seed", 2**64), ("lr", -1.0), ("eps", None)])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_bad_group_is_refused_before_another_steps_inside_backward(key, bad, steps, place):
    named = model(place.device)
    opt = ChildAdamW(
        [{"params": named[:2]}, {"params": named[2:]}], impl=place.impl, fused_backward=True, max_grad_norm=float("inf")
    )
    for _ in range(steps):
        sum(p.square().sum() for _, p in named).backward()
        opt.step()
    before = snapshot([*weights_of(named), *state_of(opt)])
    opt.param_groups[0][key] = bad
    with pytest.raises((ValueError, TypeError), match=key):
        dict(named)["head.weight"].square().sum().backward()
    assert unchanged(before, [*weights_of(named), *state_of(opt)])


@pytest.mark.parametrize("kind", ["plain", "F", "D", "F in D"])
@pytest.mark.parametrize("dtypes", [("bfloat16", "float16"), ("float16", "bfloat16")], ids=str)
def test_the_compensation_of_cast_weights_starts_anew(kind, dtypes, place):
    """... as it does where they are replaced; the moments and counters stay."""
    old, new = (getattr(torch, dtype) for dtype in dtypes)
    pair = []
    for _ in range(2):
        named = model(place.device, old)
        opt = optimizer(named, kind, impl=place.impl, low_precision="kahan")
        train(opt, named, [1, 2])
        for _, param in named:
            param.data = param.data.to(new)
        pair.append((named, opt))
    for entry in pair[1][1].state.values():
        del entry["compensation"]
    for named, opt in pair:
        train(opt, named, [3, 4])
        assert all(opt.state[p]["compensation"].dtype == new for _, p in named)
    assert same_training(*pair[0], *pair[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_cleared_entry_is_no_state_for_torch(kind):
    named = model()
    opt = optimizer(named, kind)
    train(opt, named, [1, 2])
    opt.state[named[1][1]].clear()
    twin = model()
    torchs = torch.optim.AdamW(twin)
    torchs.load_state_dict(opt.dense_state_dict())
    set_grads(twin, 3)
    torchs.step()
    assert [int(torchs.state[p]["step"]) for _, p in twin][:3] == [3, 1, 3]


@pytest.mark.parametrize("low, dtype", [("master", torch.bfloat16), ("kahan", torch.float16)])
def test_a_refused_step_leaves_no_companion_of_another_shape(low, dtype, place):
    """The weights are cast, so that a step makes their companions, and shrunk, so that it is refused."""
    pair = []
    for refused in (True, False):
        named = model(place.device)
        opt = optimizer(named, "plain", impl=place.impl, low_precision=low)
        train(opt, named, [1, 2])
        for _, param in named:
            param.data = param.data.to(dtype)
        if refused:
            head = dict(named)["head.weight"]
            good, head.data = head.data, head.data[:1]
            set_grads(named, 3)
            before = snapshot([good, *state_of(opt)])
            with pytest.raises(RuntimeError, match="state of 'head.weight'"):
                opt.step()
            assert unchanged(before, [good, *state_of(opt)])
            head.grad, head.data = None, good
        train(opt, named, [3, 4])
        pair.append((named, opt))
    assert same_training(*pair[0], *pair[1])
