"""Faults that tired hands make in the optimizer: one group taken for all, one dtype for another, the first for any."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cases import same_bits
from torch import nn

from childtune_kernels import ChildAdamW, ChildMask
from childtune_kernels.optim import gradients, step
from childtune_kernels.optim.packing import Packing


def two_groups(
    dtype: torch.dtype, shares: tuple[float, float], **kwargs
) -> tuple[ChildAdamW, list[torch.nn.Parameter]]:
    """An optimizer of two parameters of ones, each in a group with its own reserve_p."""
    params = [torch.nn.Parameter(torch.ones(600, dtype=dtype)) for _ in shares]
    groups = [
        dict(params=[(f"p{i}", p)], reserve_p=share) for i, (p, share) in enumerate(zip(params, shares, strict=True))
    ]
    return ChildAdamW(groups, weight_decay=0.0, **kwargs), params


@pytest.mark.parametrize("shares", [(0.5, 1.0), (1.0, 0.5), (0.5, 0.5)])
def test_one_group_of_f_is_enough_for_stochastic_rounding(shares):
    """lr is a 64th of the distance to the next bfloat16: to nearest no weight would ever move."""
    opt, params = two_groups(torch.bfloat16, shares, lr=2.0**-14, impl="reference")
    assert opt.low_precision == "stochastic"
    for param in params:
        param.grad = torch.ones_like(param)
    opt.step()
    moved = [int((param != 1).sum()) for param in params]
    assert all(0 < count < 60 for count in moved), moved  # 600 / 64 are expected, half of that under F


def test_without_f_rounding_is_to_nearest_by_default():
    assert two_groups(torch.bfloat16, (1.0, 1.0))[0].low_precision == "nearest"


@pytest.mark.parametrize("shares", [(0.3, 1.0), (1.0, 0.3)])
@pytest.mark.parametrize("inside_a_child", [False, True], ids=["F", "F-in-D"])
def test_f_of_one_group_alone(shares, inside_a_child):
    """Moments of constant gradients are nonzero exactly where `mask_at` says, whichever group samples."""
    child = ChildMask.from_dense({f"p{i}": torch.arange(600) % (i + 2) == 0 for i in range(2)})
    opt, params = two_groups(torch.float32, shares, mask=child if inside_a_child else None)
    for param in params:
        param.grad = torch.ones_like(param)
    opt.step()
    state = opt.dense_state_dict()["state"]
    for i, share in enumerate(shares):
        mask = opt.mask_at(1, f"p{i}")
        assert same_bits(state[i]["exp_avg"] != 0, mask)
        among = child.to_dense(f"p{i}") if inside_a_child else torch.ones(600, dtype=torch.bool)
        assert (int(mask.sum()) == int(among.sum())) == (share == 1) and not (mask & ~among).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_norm_of_16_bit_gradients_is_taken_in_fp32(dtype):
    """sqrt(3) in bfloat16 is 1.734; the norm of 400 gradients of 6e4 does not fit float16."""
    norm = step.global_norm([[torch.ones(1, dtype=dtype), torch.ones(2, dtype=dtype)]])
    assert norm.dtype == torch.float32 and abs(norm.item() - math.sqrt(3)) < 4e-7
    large = [torch.full((100,), 60000.0).to(dtype)] * 4
    expected = math.sqrt(sum(float(t.double().square().sum()) for t in large))
    assert abs(step.global_norm([large[:1], large[1:]]).item() / expected - 1) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_clipping_of_three_ones_to_a_norm_of_one(dtype):
    params = [torch.nn.Parameter(torch.zeros(n, dtype=dtype)) for n in (1, 2)]
    opt = ChildAdamW(params, betas=(0.5, 0.5), max_grad_norm=1.0)
    for param in params:
        param.grad = torch.ones_like(param)
    opt.step()
    for param in params:
        moment = opt.state[param]["exp_avg"]
        assert moment.dtype == torch.float32 and (moment.double() - 0.5 / (math.sqrt(3) + 1e-6)).abs().max() < 2e-7


def test_packed_state_serves_what_int32_can_index():
    """A stand-in for a mask: a real one of 2**31 elements takes 256 MB."""

    class Shape:
        def __init__(self, numel):
            self.numel = lambda: numel

    class Mask:
        def __init__(self, numel):
            self.shape = lambda name: Shape(numel)

        def to(self, device):
            return self

        def __iter__(self):
            return iter(["w"])

    Packing(Mask(2**31 - 1))
    with pytest.raises(ValueError, match=r"mask of 'w' must be below 2\*\*31 elements in packed state, got"):
        Packing(Mask(2**31))


@pytest.mark.parametrize("low", ["master", "kahan"])
def test_what_lies_beside_a_transposed_weight_is_row_major(low, place):
    """Its own memory format would put masters, and moments loaded from torch, in another order than the kernels'."""
    trained = []
    for transposed in (True, False):
        data = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(place.device, torch.bfloat16)
        param = nn.Parameter(data.t().contiguous().t() if transposed else data)
        opt = ChildAdamW([("w", param)], lr=0.1, low_precision=low, impl=place.impl)
        adam = torch.optim.AdamW([param], lr=0.1, foreach=False)
        for t, o in enumerate((opt, adam)):
            grad = torch.randn(5, 7, generator=torch.Generator().manual_seed(t)).to(place.device, torch.bfloat16)
            param.grad = grad.t().contiguous().t() if transposed else grad
            o.step()
            if o is adam:
                assert adam.state[param]["exp_avg"].is_contiguous() != transposed
                opt.load_state_dict(adam.state_dict())
                opt.step()
        trained.append([param.detach().contiguous(), *(x.contiguous() for x in opt.state[param].values())])
        assert all(x.is_contiguous() for x in opt.state[param].values())
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))


def test_frozen_weights_of_a_tied_parameter_under_its_second_name():
    net = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    net["head"].weight = net["embed"].weight
    pretrained = copy.deepcopy(net)
    weight = net["head"].weight
    opt = ChildAdamW([("head.weight", weight)], mask=ChildMask.from_dense({"head.weight": torch.eye(6, 4).bool()}))
    weight.grad = torch.ones(6, 4)
    opt.step()
    opt.assert_frozen(pretrained)
    with torch.no_grad():
        weight[0, 1] += 1
    with pytest.raises(AssertionError, match=r"these many differ: \{'head.weight': 1\}"):
        opt.assert_frozen(pretrained)


def test_gradients_wait_until_enough_are_together(monkeypatch):
    """... and no longer: what waits is memory."""
    monkeypatch.setattr(gradients, "TOGETHER", 4 * 8 * 8 + 1)
    net = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3)))
    mask = ChildMask.from_dense({name: torch.eye(8).bool() for name, _ in net.named_parameters()})
    opt = ChildAdamW(net.named_parameters(), mask=mask, pack_gradients=True, max_grad_norm=math.inf)
    net(torch.ones(2, 8)).sum().backward()
    assert len(opt.hooks.waiting) == 1 and opt.hooks.waiting_bytes == 4 * 8 * 8  # of three, two went together
    assert sum(hook.grad is not None for hook in opt.hooks.hooks.values()) == 2
