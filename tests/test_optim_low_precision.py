"""Low-precision weights: what each way of keeping them does to a trajectory, and what state it takes."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import KINDS, MODEL, child_mask, model, optimizer, same_training, train, weights_of
from oracles import Oracle

from childtune_kernels import ChildAdamW

WAYS = ("master", "kahan", "stochastic", "nearest")
LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def trajectory(way, dtype, steps, place, n=2000, lr=1e-4, **kwargs):
    """Weights around 1 under updates far below their last bit; the fp64 truth of the same, and the optimizer."""
    start = (torch.rand(n, generator=torch.Generator().manual_seed(0)) + 0.5).to(dtype)
    param = torch.nn.Parameter(start.clone().to(place.device))
    opt = ChildAdamW([param], lr=lr, weight_decay=0.0, low_precision=way, impl=place.impl, **kwargs)
    truth = Oracle(start)
    generator = torch.Generator().manual_seed(1)
    drift = torch.rand(n, generator=generator) + 0.2
    for _ in range(steps):
        grad = (drift + 0.3 * torch.randn(n, generator=generator)).to(dtype)
        param.grad = grad.to(place.device)
        opt.step()
        truth.step(grad, lr=lr, weight_decay=0.0)
    return start.double(), param.detach().cpu().double(), truth.w, opt


@LOW
def test_a_thousand_small_steps_are_not_lost(dtype, place):
    """Nearest stalls: no update reaches half a unit of the weight. The others follow fp64 to about one unit."""
    steps = 1000 if place.impl != "triton" or place.device == "cuda" else 20
    lr = 1e-4 if dtype == torch.bfloat16 else 1e-5
    unit = torch.finfo(dtype).eps  # of weights in [1, 2)
    errors, moved = {}, {}
    for way in WAYS:
        start, got, truth, _ = trajectory(way, dtype, steps, place, lr=lr)
        errors[way] = (got - truth).abs().mean().item() / unit
        moved[way] = ((start - got).mean() / (start - truth).mean()).item()
    assert errors["master"] <= 0.5 and errors["kahan"] <= 0.5
    if steps == 1000:
        assert (
            abs(moved["stochastic"] - 1) < 0.02 and abs(moved["master"] - 1) < 0.02 and abs(moved["kahan"] - 1) < 0.02
        )
        assert moved["nearest"] < 0.2 and errors["nearest"] > 2 * errors["stochastic"]


@LOW
@pytest.mark.parametrize("way", WAYS)
def test_every_run_is_the_same(way, dtype, place):
    runs = [trajectory(way, dtype, 10, place)[1] for _ in range(2)]
    assert torch.equal(*runs)
    other = trajectory(way, dtype, 10, place, seed=1)[1]
    assert torch.equal(runs[0], other) == (way != "stochastic")


def test_defaults():
    assert optimizer(model(), "D").low_precision == "master"
    assert optimizer(model(), "F in D").low_precision == "master"
    assert optimizer(model(), "D, dense").low_precision == "nearest"
    assert optimizer(model(), "F").low_precision == "stochastic"
    assert optimizer([{"params": model(), "reserve_p": 0.5}], "plain").low_precision == "stochastic"
    assert optimizer(model(), "plain").low_precision == "nearest"


@pytest.mark.parametrize("way, key, dtype", [("master", "master", torch.float32), ("kahan", "compensation", None)])
@pytest.mark.parametrize("kind", ["plain", "F", "D", "F in D"])
def test_state_beside_16_bit_weights(kind, way, key, dtype):
    for weight_dtype in (torch.float32, torch.bfloat16, torch.float16):
        named = model(dtype=weight_dtype)
        opt = optimizer(named, kind, low_precision=way)
        train(opt, named, [1])
        for name, param in named:
            entry = opt.state[param]
            if weight_dtype == torch.float32:
                assert entry.keys() == {"step", "exp_avg", "exp_avg_sq"}
            else:
                packed = "D" in kind and name in child_mask()
                assert entry.keys() == {"step", "exp_avg", "exp_avg_sq", key}
                assert entry[key].shape == ((child_mask().count(name),) if packed else param.shape)
                assert entry[key].dtype == (dtype or weight_dtype)


@LOW
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("D, dense", "D, decay all")])
def test_resuming(kind, way, dtype, place):
    kwargs = dict(impl=place.impl, low_precision=way)
    named, straight = model(place.device, dtype), model(place.device, dtype)
    opt, other = optimizer(named, kind, **kwargs), optimizer(straight, kind, **kwargs)
    train(opt, named, [1, 2, 3])
    train(other, straight, [1, 2, 3])
    resumed = [(n, torch.nn.Parameter(p.detach().clone())) for n, p in named]
    new = optimizer(resumed, kind, **kwargs)
    new.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(new, resumed, [4, 5])
    train(other, straight, [4, 5])
    assert same_training(straight, other, resumed, new)


def test_weights_cast_during_training_get_and_lose_their_companions(place):
    named = model(place.device)
    opt = optimizer(named, "D", impl=place.impl)
    train(opt, named, [1])
    for _, param in named:
        param.data, param.grad = param.data.bfloat16(), None
    train(opt, named, [2])
    assert all("master" in opt.state[p] for _, p in named)
    for _, param in named:
        param.data, param.grad = param.data.float(), None
    train(opt, named, [3])
    assert not any("master" in opt.state[p] for _, p in named)


def test_a_master_carries_what_16_bits_do_not(place):
    """Two optimizers whose weights agree after rounding, but whose masters do not, drift apart later."""
    named = model(place.device, torch.bfloat16)
    opt = optimizer(named, "D", impl=place.impl, lr=1e-5)
    train(opt, named, range(1, 4))
    for name, param in named:
        master = opt.state[param]["master"]
        held = param.detach()
        if name in child_mask():
            held = held[child_mask().to_dense(name).to(place.device)]
        assert torch.equal(master.to(torch.bfloat16), held)
        assert torch.Size(MODEL[name]).numel() == 1 or not torch.equal(master, held.float())


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(low_precision="double"), "low_precision must be one of .*'master'.*, got 'double'"),
        (dict(mask=child_mask(), state="dense", low_precision="master"), "must be 'nearest' where state='dense', got"),
        (dict(mask=child_mask(), decay="all", low_precision="kahan"), "must be 'nearest' where state='dense', got"),
    ],
)
def test_bad_choices(options, message):
    with pytest.raises(ValueError, match=message):
        ChildAdamW(model(), **options)


def test_fp32_weights_are_the_same_either_way(place):
    runs = []
    for way in WAYS:
        named = model(place.device)
        train(optimizer(named, "F", impl=place.impl, low_precision=way), named, [1, 2])
        runs.append(weights_of(named))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
