"""What ChildAdamW refuses: each error names the argument, what was expected and what came; nothing has changed."""

from __future__ import annotations

import math

import pytest
import torch
from cases import MODEL, child_mask, model, optimizer, set_grads, snapshot, state_of, train, unchanged, weights_of

from childtune_kernels import ChildAdamW, ChildMask, ops

NAN = math.nan
# Hyper-parameters of a group: refused at construction, in add_param_group and, set by hand, at the next step.
BAD_GROUPS = [
    ({"lr": -1e-3}, "lr must be at least 0, got -0.001"),
    ({"lr": NAN}, "lr must be at least 0, got nan"),
    ({"lr": torch.tensor(-1.0)}, "lr must be at least 0, got -1.0"),
    ({"lr": torch.zeros(2)}, r"lr must be a float or a tensor of one element, got .*\(2,\)"),
    ({"lr": "fast"}, "lr must be a number, got 'fast'"),
    ({"lr": None}, "lr must be a number, got None"),
    ({"betas": (-0.1, 0.9)}, r"betas\[0\] must be at least 0, got -0.1"),
    ({"betas": (1.0, 0.9)}, r"betas\[0\] must be in \[0, 1\), got 1.0"),
    ({"betas": (0.9, NAN)}, r"betas\[1\] must be at least 0, got nan"),
    ({"betas": (0.9,)}, r"betas must be a pair, got \(0.9,\)"),
    ({"betas": 0.9}, "betas must be a pair, got 0.9"),
    ({"eps": -1e-8}, "eps must be at least 0, got -1e-08"),
    ({"eps": NAN}, "eps must be at least 0, got nan"),
    ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
    ({"weight_decay": NAN}, "weight_decay must be at least 0, got nan"),
    ({"weight_decay": None}, "weight_decay must be a number, got None"),
    ({"reserve_p": 0}, r"reserve_p must be in \(0, 1\], at least 2\*\*-32, got 0"),
    ({"reserve_p": -0.3}, "reserve_p must be at least 0, got -0.3"),
    ({"reserve_p": 1.01}, r"reserve_p must be in \(0, 1\], at least 2\*\*-32, got 1.01"),
    ({"reserve_p": NAN}, "reserve_p must be at least 0, got nan"),
    ({"reserve_p": 1e-10}, r"reserve_p must be in \(0, 1\], at least 2\*\*-32, got 1e-10"),
    ({"reserve_p": "0.3"}, "reserve_p must be a number, got '0.3'"),
    ({"seed": -1}, r"seed must be an integer in \[0, 2\*\*64\), got -1"),
    ({"seed": 2**64}, r"seed must be an integer in \[0, 2\*\*64\), got 18446744073709551616"),
    ({"seed": 0.5}, r"seed must be an integer in \[0, 2\*\*64\), got 0.5"),
]
IDS = [f"{next(iter(bad))}={next(iter(bad.values()))}".replace(" ", "") for bad, _ in BAD_GROUPS]


@pytest.mark.parametrize("bad, message", BAD_GROUPS, ids=IDS)
def test_bad_hyper_parameters_at_construction(bad, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ChildAdamW(model(), **bad)


@pytest.mark.parametrize("bad, message", BAD_GROUPS, ids=IDS)
def test_bad_hyper_parameters_of_an_added_group(bad, message):
    named = model()
    opt = optimizer(named[:3])
    train(opt, named[:3], [1])
    with pytest.raises((ValueError, TypeError), match=message):
        opt.add_param_group({"params": named[3:], **bad})
    assert len(opt.param_groups) == 1
    train(opt, named[:3], [2])


@pytest.mark.parametrize("bad, message", BAD_GROUPS, ids=IDS)
def test_bad_hyper_parameters_set_between_steps(bad, message, place):
    """... in the second of two groups: nothing of the first may have been updated."""
    named = model(place.device)
    opt = optimizer([{"params": named[:2]}, {"params": named[2:]}], impl=place.impl)
    train(opt, named, [1])
    good = dict(opt.param_groups[1])
    opt.param_groups[1].update(bad)
    set_grads(named, 2)
    before = weights_of(named) + snapshot(state_of(opt))
    with pytest.raises((ValueError, TypeError), match=message):
        opt.step()
    assert unchanged(before, weights_of(named) + state_of(opt))
    opt.param_groups[1].update({key: good[key] for key in bad})
    opt.step()
    assert not unchanged(before, weights_of(named) + state_of(opt))


def _mask(**dense):
    return ChildMask.from_dense({name.replace("__", "."): bits for name, bits in dense.items()})


ONES = torch.ones(7, 5, dtype=torch.bool)
BAD_ARGUMENTS = [
    ({"reserve_p": True}, "reserve_p must be a number, got True"),
    ({"dialect": "adam"}, "dialect must be 'torch' or 'hf', got 'adam'"),
    ({"decay": "none"}, "decay must be 'child' or 'all', got 'none'"),
    ({"state_dtype": torch.float64}, "state_dtype must be float32, bfloat16 or float16, got torch.float64"),
    ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0 or None, got 0.0"),
    ({"max_grad_norm": -1.0}, "max_grad_norm must be above 0 or None, got -1.0"),
    ({"max_grad_norm": NAN}, "max_grad_norm must be above 0 or None, got nan"),
    ({"impl": "cuda"}, r"impl must be one of \('auto', 'triton', 'csrc', 'reference'\), got 'cuda'"),
    ({"mask": {"embed.weight": ONES}}, "mask must be a ChildMask or None, got {'embed.weight'"),
    (
        {"mask": _mask(pooler=ONES)},
        "mask must be a mask that names only this optimizer.s parameters.*model.named_parameters.*got .pooler. beside",
    ),
    ({"mask": _mask(embed__weight=ONES.t())}, r"mask of 'embed.weight' must be of shape \(7, 5\), got \(5, 7\)"),
    (
        {"mask": _mask(embed__weight=ONES), "state": "dense", "reserve_p": 0.3},
        "reserve_p must be 1 where a mask is given.*, got 0.3",
    ),
    ({"mask": _mask(embed__weight=ONES), "state": "sparse"}, "state must be 'packed' or 'dense', got 'sparse'"),
    ({"mask": _mask(embed__weight=~ONES)}, "mask must be one with at least one weight.*, got 'an empty child'"),
    ({"state": "packed"}, "state must be 'dense' where .* there is no mask.*, got 'packed'"),
    ({"mask": _mask(embed__weight=ONES), "state": "packed", "decay": "all"}, "state must be 'dense' where decay='all'"),
]


@pytest.mark.parametrize(
    "bad, message", BAD_ARGUMENTS, ids=[f"{list(b)[-1]}-{i}" for i, (b, _) in enumerate(BAD_ARGUMENTS)]
)
def test_bad_arguments(bad, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ChildAdamW(model(), **bad)


P = torch.nn.Parameter(torch.ones(3))
BAD_PARAMS = [
    (
        [("w", P), ("w", torch.nn.Parameter(torch.ones(4)))],
        ValueError,
        "params must be a name not used before, got 'w'",
    ),
    ([P, P], ValueError, "params must be distinct tensors"),
    (
        [torch.nn.Parameter(torch.ones(3, dtype=torch.float64))],
        TypeError,
        "'0' must have dtype float32, .* got torch.float64",
    ),
    ([torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))], TypeError, "'0' must have dtype float32, .*complex64"),
    ([], ValueError, "empty parameter list"),
    ([P * 2], ValueError, "non-leaf"),
    (["w"], TypeError, "can only optimize Tensors"),
    ([("w", P), torch.nn.Parameter(torch.ones(4))], ValueError, "names"),
    ([{"params": {P}}], TypeError, "params must be in order.*, got a set"),
    (P, TypeError, "iterable"),
]


@pytest.mark.parametrize(
    "params, error, message", BAD_PARAMS, ids=[m.strip("'")[:20].replace(" ", "-") for _, _, m in BAD_PARAMS]
)
def test_bad_parameters(params, error, message):
    with pytest.raises(error, match=message):
        ChildAdamW(params)


TWO, DOUBLE = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2).double())
ADDED = [
    ([("layer.bias", TWO)], ValueError, "params must be a name not used before, got 'layer.bias'"),
    ([("x", TWO), ("y", DOUBLE)], TypeError, "'y' must have dtype"),
    ([TWO], ValueError, "without names"),
]


@pytest.mark.parametrize("params, error, message", ADDED, ids=["name", "dtype", "unnamed"])
def test_a_refused_group_leaves_no_trace(params, error, message):
    named = model()
    opt = optimizer(named, "F")
    train(opt, named, [1])
    before = opt.describe()
    with pytest.raises(error, match=message):
        opt.add_param_group({"params": params})
    assert opt.describe() == before and len(opt.param_groups) == 1
    with pytest.raises(ValueError, match="more than one parameter group|name not used before"):
        opt.add_param_group({"params": [("other name", named[0][1])]})
    assert opt.describe() == before
    train(opt, named, [2])


def _grad_of_another_dtype(param):
    param.grad_dtype = None  # lets torch accept one
    param.grad = torch.ones_like(param, dtype=torch.bfloat16)


def _sparse_grad(param):
    param.grad = torch.ones_like(param.data).to_sparse()


def _complex_grad(param):
    param.grad_dtype = None
    param.grad = torch.ones_like(param, dtype=torch.complex64)


def _shape_moved(param):
    param.grad = torch.ones_like(param)
    param.data = torch.ones(3, 1032)


BAD_GRADS = {
    "dtype": (
        _grad_of_another_dtype,
        "gradient of parameter 'head.weight' must have dtype torch.float32, got torch.bfloat16",
    ),
    "sparse": (_sparse_grad, "gradient of parameter 'head.weight' must be dense, got layout torch.sparse_coo"),
    "complex": (
        _complex_grad,
        "gradient of parameter 'head.weight' must have dtype torch.float32, got torch.complex64",
    ),
    "shape": (_shape_moved, r"gradient of parameter 'head.weight' must have shape \(3, 1032\), got \(3, 1031\)"),
}


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("spoil, message", BAD_GRADS.values(), ids=BAD_GRADS)
def test_bad_gradients_change_nothing(spoil, message, steps_before):
    """The last parameter's, so that all others could have been updated already."""
    named = model()
    opt = optimizer(named, "F")
    train(opt, named, range(1, steps_before + 1))
    set_grads(named, 9)
    spoil(named[-1][1])
    before = weights_of(named) + snapshot(state_of(opt))
    with pytest.raises(RuntimeError, match=message):
        opt.step()
    assert unchanged(before, weights_of(named) + state_of(opt))


def test_a_parameter_cast_to_float64_is_refused():
    named = model()
    opt = optimizer(named)
    train(opt, named, [1])
    named[-1][1].grad = None
    named[-1][1].data = named[-1][1].data.double()
    set_grads(named, 2)
    before = weights_of(named) + snapshot(state_of(opt))
    with pytest.raises(
        TypeError, match="params: 'head.weight' must have dtype float32, bfloat16 or float16, got torch.float64"
    ):
        opt.step()
    assert unchanged(before, weights_of(named) + state_of(opt))


@pytest.mark.parametrize("impl", ["csrc", "triton"])
def test_an_unavailable_implementation_is_refused_with_its_reason(impl, monkeypatch):
    monkeypatch.setattr(
        ops.registry, "unavailable", lambda name, device: None if name == "reference" else "there is no compiler"
    )
    ops.implementation.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=f"impl='{impl}' is not available for cpu tensors: there is no compiler"):
            ChildAdamW(model(), impl=impl)
        assert ChildAdamW(model()).impl == "reference"
    finally:
        ops.implementation.cache_clear()


def test_the_mask_may_name_parameters_of_any_group():
    named = model()
    assert set(child_mask()) <= set(MODEL)
    opt = optimizer([{"params": named[:3]}, {"params": named[3:]}], "D")
    assert torch.equal(opt.mask_at(1, "head.weight"), child_mask().to_dense("head.weight"))
