"""No stale pointer: whatever becomes of a tensor between two steps, the next one uses it as it is then, or refuses."""

from __future__ import annotations

import pytest
import torch
from cases import (
    KINDS,
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

from childtune_kernels import ChildAdamW
from childtune_kernels.ops import tensors as lists

WAYS = (  # kind, dtype of the weights, how 16-bit ones are kept
    *((kind, torch.float32, None) for kind in KINDS),
    ("plain", torch.bfloat16, "master"),
    ("F", torch.float16, "kahan"),
    ("D", torch.bfloat16, "master"),
    ("F in D", torch.bfloat16, "kahan"),
)
ways = pytest.mark.parametrize("kind, dtype, low", WAYS, ids=[f"{k}-{d}-{w}" for k, d, w in WAYS])


@pytest.fixture(params=["compiled", "python"])
def reader(request, monkeypatch):
    """Both ways in which forms and addresses are read."""
    if request.param == "python":
        monkeypatch.setattr(lists, "_compiled", None)
    elif lists._compiled is None:
        pytest.skip("csrc/python is not built for this torch")


def twins(kind, dtype, low, place):
    """Two optimizers that have taken the same two steps, with their parameters."""
    pair = []
    for _ in range(2):
        named = model(place.device, dtype)
        opt = optimizer(named, kind, low_precision=low, impl=place.impl)
        train(opt, named, [1, 2])
        pair.append((named, opt))
    return pair


def assert_alike(pair, steps=(3, 4)) -> None:
    for named, opt in pair:
        train(opt, named, steps)
    (named, opt), (others, twin) = pair
    assert same_training(named, opt, others, twin)


@ways
def test_other_data_behind_the_same_state_tensor_is_used(kind, dtype, low, place, reader):
    """``state[p][key].data = ...``: the old memory may be anybody's by now."""
    pair = twins(kind, dtype, low, place)
    olds = []
    for entry in pair[0][1].state.values():
        for tensor in entry.values():
            olds.append((tensor.data, tensor.data.clone()))
            tensor.data = tensor.data.clone()
    assert_alike(pair)
    assert all(torch.equal(old, kept) for old, kept in olds), "wrote to memory that is no longer the optimizer's"


OTHER = {
    "strides": lambda t: t.t(),
    "sizes": lambda t: t.view(3, 12),
    "dtype": lambda t: t.view(torch.int32),
    "sign": torch._neg_view,
    "layout": torch.Tensor.to_sparse,
    "device": lambda t: t.to("meta"),
    "storage": torch.clone,
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.sparse_coo, torch.sparse_csr], ids=str)
@pytest.mark.parametrize("what", OTHER)
def test_forms_tell_what_a_kernel_must_know(what, layout, reader):
    """All but where a tensor lies; also of a tensor beside one that has no strides."""
    tensor, beside = torch.randn(6, 6), torch.ones(2, 2)
    beside = beside if layout == torch.strided else beside.to_sparse(layout=layout)
    same = lists.forms([tensor, beside]) == lists.forms([OTHER[what](tensor), beside])
    assert same == (what == "storage")
    assert lists.forms([tensor]) != lists.forms([tensor, beside])
    with pytest.raises(TypeError):
        lists.forms([tensor, None])


@ways
def test_weights_moved_to_other_memory_are_followed(kind, dtype, low, place, reader):
    pair = twins(kind, dtype, low, place)
    olds = []
    for _, param in pair[0][0]:
        olds.append((param.data, param.data.clone()))
        param.data = param.data.clone()
    assert_alike(pair)
    assert all(torch.equal(old, kept) for old, kept in olds)


@pytest.mark.parametrize("kind", KINDS)
def test_other_strides_at_the_same_address_are_followed(kind, place, reader):
    """A square matrix transposed in place: same address, size and dtype."""
    pair = twins(kind, torch.float32, None, place)
    for named, opt in pair:
        square = torch.nn.Parameter(torch.randn(6, 6, generator=torch.Generator().manual_seed(8)).to(place.device))
        opt.add_param_group({"params": [("square", square)], "reserve_p": opt.param_groups[0]["reserve_p"]})
        named.append(("square", square))
        train(opt, named, [3, 4])
    first, second = pair[0][0][-1][1], pair[1][0][-1][1]
    first.data = first.data.t()
    second.data = second.data.t().contiguous()
    assert_alike(pair, [5, 6])


SHRUNK = {
    "parameter, fewer rows": lambda p, s: setattr(p, "data", p.data[:1]),
    "parameter, another dtype": lambda p, s: setattr(p, "data", p.data.to(torch.float64)),
    "exp_avg, fewer": lambda p, s: setattr(s["exp_avg"], "data", s["exp_avg"].data.view(-1)[:3]),
    "exp_avg, other bits": lambda p, s: setattr(s["exp_avg"], "data", s["exp_avg"].data.view(torch.int32)),
    "exp_avg_sq, fewer": lambda p, s: setattr(s["exp_avg_sq"], "data", s["exp_avg_sq"].data.view(-1)[:3]),
    "exp_avg_sq, strided": lambda p, s: setattr(s["exp_avg_sq"], "data", s["exp_avg_sq"].data.new_zeros(9)[::2]),
    "exp_avg, strided": lambda p, s: s["exp_avg"].as_strided_(s["exp_avg"].shape, (0,) * s["exp_avg"].dim()),
    "step, two": lambda p, s: setattr(s["step"], "data", s["step"].data.new_zeros(2)),
    "exp_avg, no memory": lambda p, s: s["exp_avg"].untyped_storage().resize_(0),
    "parameter, no memory": lambda p, s: p.untyped_storage().resize_(0),
}


@pytest.mark.parametrize("change", SHRUNK.values(), ids=SHRUNK)
@pytest.mark.parametrize("kind", KINDS)
def test_what_no_longer_fits_is_refused_before_anything_changes(kind, change, place, reader):
    named = model(place.device)
    opt = optimizer(named, kind, impl=place.impl)
    train(opt, named, [1, 2])
    set_grads(named, 3)
    param = dict(named)["head.weight"]
    change(param, opt.state[param])
    if param.numel() != 3 * 1031:
        param.grad = torch.ones_like(param)
    others = [p for name, p in named if name != "head.weight"]
    before = snapshot(others) + [t.clone() for p in others for t in opt.state[p].values()]
    with pytest.raises((RuntimeError, TypeError, ValueError), match="head.weight|memory"):
        opt.step()
    assert unchanged(before, others + [t for p in others for t in opt.state[p].values()])


@pytest.mark.parametrize("strides", [(0, 1), (1, 0), (1, 1), (1, 2)])
def test_elements_that_share_a_place_are_refused(strides, place, reader):
    """... before other parameters have moved: torch refuses only to write them back."""
    data = torch.zeros(64, device=place.device)
    with pytest.raises(RuntimeError, match="must have a place for every element"):
        ChildAdamW([("w", torch.nn.Parameter(data.as_strided((3, 4), strides)))], impl=place.impl)
    named = model(place.device)
    opt = optimizer(named, impl=place.impl)
    train(opt, named, [1])
    param = dict(named)["head.weight"]
    param.data = torch.zeros(6000, device=place.device).as_strided(param.shape, strides)
    set_grads(named, 2)
    before = weights_of(named) + snapshot(state_of(opt))
    with pytest.raises(RuntimeError, match="'head.weight' must have a place for every element"):
        opt.step()
    assert unchanged(before, weights_of(named) + state_of(opt))


def test_growing_in_place_is_refused(place, reader):
    big = torch.zeros(4096, device=place.device)
    param = torch.nn.Parameter(big[:1024])
    opt = ChildAdamW([("w", param)], impl=place.impl)
    param.grad = torch.ones_like(param)
    opt.step()
    param.grad, param.data = None, big
    param.grad = torch.ones_like(param)
    before = big.clone()
    with pytest.raises(RuntimeError, match="state of 'w': exp_avg must have shape"):
        opt.step()
    assert torch.equal(big, before)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_swapped_behind_their_tensor_are_read_as_they_are(kind, place, reader):
    """The same gradient tensors, other data: elsewhere, transposed, of another size."""
    pair = twins(kind, torch.float32, None, place)
    for t in (3, 4):
        for named, _ in pair:
            set_grads(named, t)
        for _, param in pair[0][0]:
            data = param.grad.data
            param.grad.data = data.t().contiguous().t() if data.dim() == 2 and t == 3 else data.clone()
        for _, opt in pair:
            opt.step()
    assert same_training(*pair[0], *pair[1])
    named, opt = pair[0]
    grad = dict(named)["head.weight"].grad
    before = weights_of(named) + snapshot(state_of(opt))
    for wrong in (grad.data[:1], grad.data.double(), grad.data.view(-1)):
        grad.data = wrong
        with pytest.raises(RuntimeError, match="gradient of parameter 'head.weight' must have"):
            opt.step()
    assert unchanged(before, weights_of(named) + state_of(opt))


def test_negated_gradients_are_read_as_they_are(place, reader):
    """The imaginary part of a conjugate is a view whose sign torch keeps beside the bits."""
    pair = twins("plain", torch.float32, None, place)
    for named, _ in pair:
        set_grads(named, 3)
    for _, param in pair[0][0]:
        grad = param.grad.clone()
        param.grad = torch.complex(grad, -grad).conj().imag
        assert param.grad.is_neg() and torch.equal(param.grad, grad)
    for _, opt in pair:
        opt.step()
    assert same_training(*pair[0], *pair[1])


@pytest.mark.parametrize("kind", ["D", "F in D"])
def test_indices_and_mask_words_are_compared_too(kind, place, reader):
    pair = twins(kind, torch.float32, None, place)
    opt = pair[0][1]
    indices = opt.config.packing.indices("head.weight", pair[0][0][0][1].device)
    indices.data = indices.data.clone()
    assert_alike(pair)
    indices.data = indices.data[:5]
    before = weights_of(pair[0][0])
    set_grads(pair[0][0], 5)
    with pytest.raises(ValueError, match="indices of 'head.weight' must be for moments of"):
        opt.step()
    assert unchanged(before, weights_of(pair[0][0]))


def test_forms_tell_every_difference(reader):
    """... that an address does not."""
    x = torch.arange(16.0).view(4, 4)
    same = [x, x.clone(), torch.zeros(4, 4)]
    others = [
        x.t(), x[:2], x.view(16), x.view(2, 8), x.bfloat16(), x.view(torch.int32), x.double(), x.to("meta"),
        torch.complex(x, x).conj().imag.contiguous().clone().resolve_neg()[:, :2], torch._neg_view(x), x.to_sparse(),
        x[..., None], x.as_strided((4, 4), (0, 1)),
    ]  # fmt: skip
    assert all(lists.forms([t]) == lists.forms([x]) for t in same)
    assert all(lists.forms([t]) != lists.forms([x]) for t in others)
    assert lists.forms([x, x.t()]) != lists.forms([x.t(), x]) and lists.forms([]) == lists.forms([])
    with pytest.raises(TypeError):
        lists.forms([x, None])


def test_addresses_are_torchs(reader):
    tensors = [torch.randn(n)[o:] for n, o in ((0, 0), (5, 1), (8, 0))]
    assert lists.addresses(tensors).tolist() == [t.data_ptr() for t in tensors]


@pytest.mark.gpu
@ways
def test_state_offloaded_and_back(kind, dtype, low, reader):
    """As `optimizer_to` does it, in any order, with other allocations between."""
    place = type("Place", (), {"device": "cuda", "impl": "auto"})
    for keys in (("step", "exp_avg", "exp_avg_sq", "master", "compensation"), ("exp_avg_sq",), ("master", "step")):
        pair = twins(kind, dtype, low, place)
        entries = list(pair[0][1].state.values())
        for entry in entries:
            for key in keys:
                if key in entry:
                    entry[key].data = entry[key].data.cpu()
        others = [torch.randn(n, device="cuda") for n in (64, 3093, 1000, 100_000) for _ in range(5)]
        del others[::2]
        for entry in reversed(entries):
            for key in reversed(keys):
                if key in entry:
                    entry[key].data = entry[key].data.cuda()
        assert_alike(pair)
