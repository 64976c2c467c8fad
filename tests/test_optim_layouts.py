"""Tensors as they come: empty, misaligned, strided, tied, of several dtypes, replaced between steps."""

from __future__ import annotations

import pytest
import torch
from cases import (
    KINDS,
    MODEL,
    Guards,
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
from oracles import Judge, same_bits

from childtune_kernels import ChildAdamW, ChildMask, philox


def grads_of(named) -> list[torch.Tensor]:
    return [p.grad for _, p in named]


@pytest.mark.parametrize("empty_at", [(0,), (2,), (5,), (0, 3, 5), (0, 1, 2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_empty_parameters_anywhere(kind, empty_at, place):
    """... neither break the others nor stop them; empty ones count steps, as in torch."""
    full, plain = model(place.device), model(place.device)
    mixed = list(full) if len(empty_at) < 6 else []
    for i in empty_at:
        mixed.insert(i, (f"empty{i}", torch.nn.Parameter(torch.zeros(0, 3, device=place.device))))
    mask = None if "D" not in kind or mixed[1:2] == [] else child_mask()
    kwargs = dict(impl=place.impl, **({"mask": mask} if "D" in kind and len(empty_at) == 6 else {}))
    if "D" in kind and len(empty_at) == 6:
        kwargs["mask"] = ChildMask.from_dense({"empty0": torch.zeros(0, 3, dtype=torch.bool)})
    opt, reference = optimizer(mixed, kind, **kwargs), optimizer(plain, kind, impl=place.impl)
    for t in range(1, 4):
        set_grads(full, t)
        for _, param in mixed:
            param.grad = torch.zeros_like(param) if not param.numel() else param.grad
        opt.step()
        train(reference, plain, [t])
    if len(empty_at) < 6:
        assert unchanged(weights_of(plain), weights_of(full))
    assert all(opt.state[p]["step"].item() == 3 for _, p in mixed)


def _expanded(grad):
    return grad.flatten()[:1].expand(grad.shape) if grad.dim() else grad


def _strided(grad):
    return torch.stack([grad, grad], dim=-1)[..., 0]


def _transposed(grad):
    return grad.t().contiguous().t() if grad.dim() == 2 else grad.clone()


def _misaligned(grad):
    return Guards().place(grad, 3)


GRADS = {"misaligned": _misaligned, "transposed": _transposed, "strided": _strided, "expanded": _expanded}


@pytest.mark.parametrize("change", GRADS.values(), ids=GRADS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_any_strides(kind, change, dtype, place):
    named, plain = model(place.device, dtype), model(place.device, dtype)
    opt, reference = (optimizer(n, kind, impl=place.impl) for n in (named, plain))
    for t in range(1, 4):
        for n in (named, plain):
            set_grads(n, t)
            for _, param in n:
                param.grad = change(param.grad) if n is named else change(param.grad).contiguous().clone()
        before = snapshot(grads_of(named))
        opt.step()
        reference.step()
        assert unchanged(before, grads_of(named))
    assert same_training(named, opt, plain, reference)


def test_gradients_that_alternate_between_layouts(place):
    """A cached plan must look at each step's gradient anew."""
    named, plain = model(place.device), model(place.device)
    opt, reference = (optimizer(n, "F", impl=place.impl) for n in (named, plain))
    for t, change in enumerate([_misaligned, _strided, _transposed, torch.clone, _misaligned, _strided], start=1):
        set_grads(named, t)
        for _, param in named:
            param.grad = change(param.grad)
        opt.step()
        train(reference, plain, [t])
    assert same_training(named, opt, plain, reference)


def _strided_model(device, layout):
    """The same values, contiguous and not: (name, parameter) lists."""
    values = torch.randn(4, 6, 5, 3, generator=torch.Generator().manual_seed(0)).to(device)
    if layout == "channels_last":
        strided = values.clone(memory_format=torch.channels_last)
    else:
        values = values.view(24, 15)
        strided = values.t().contiguous().t() if layout == "transposed" else torch.stack([values, values], -1)[..., 1]
    assert not strided.is_contiguous() and torch.equal(strided, values)
    return [("w", torch.nn.Parameter(strided))], [("w", torch.nn.Parameter(values))]


@pytest.mark.parametrize("kind", ["plain", "F", "D"])
@pytest.mark.parametrize("layout", ["transposed", "channels_last", "slice"])
def test_parameters_of_any_strides_are_row_major(layout, kind, place):
    """Masks and streams count elements row by row, whatever lies in memory; strides stay what they are."""
    strided, plain = _strided_model(place.device, layout)
    shape = strided[0][1].shape
    kwargs = dict(impl=place.impl)
    if kind == "D":
        bits = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4
        kwargs["mask"] = ChildMask.from_dense({"w": bits})
    opts = [optimizer(n, kind, **kwargs) for n in (strided, plain)]
    before, strides = plain[0][1].detach().clone(), strided[0][1].stride()
    address = strided[0][1].data_ptr()
    for t in range(1, 5):
        for n, opt in zip((strided, plain), opts, strict=True):
            train(opt, n, [t])
    assert same_training(strided, opts[0], plain, opts[1])
    assert strided[0][1].stride() == strides and strided[0][1].data_ptr() == address
    if kind == "D":
        assert torch.equal((strided[0][1].detach() != before).cpu(), bits)
    if kind == "F":
        assert torch.equal(opts[0].mask_at(4, "w").cpu(), philox.mask_at("w", shape, seed=5, step=4, p=0.3))


@pytest.mark.parametrize("kind", KINDS)
def test_several_dtypes_in_one_group(kind, place):
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    named = [
        (name, torch.nn.Parameter(p.detach().to(dtypes[i % 3]))) for i, (name, p) in enumerate(model(place.device))
    ]
    opt = optimizer(named, kind, impl=place.impl)
    train(opt, named, range(1, 4))
    for i, name in enumerate(MODEL):
        alone = [(name, torch.nn.Parameter(model(place.device)[i][1].detach().to(dtypes[i % 3])))]
        in_mask = name in child_mask()
        mask = ChildMask.from_dense({name: child_mask().to_dense(name)}) if in_mask else None
        kwargs = dict(impl=place.impl, low_precision=opt.low_precision, **({"mask": mask} if "D" in kind else {}))
        other = optimizer(alone, kind, **kwargs)
        for t in range(1, 4):
            set_grads(named, t)
            alone[0][1].grad = named[i][1].grad
            other.step()
        assert same_bits(alone[0][1], named[i][1])


def test_tied_weights_are_updated_once(place):
    embedding = torch.nn.Embedding(11, 6, device=place.device)
    head = torch.nn.Linear(6, 11, bias=False, device=place.device)
    head.weight = embedding.weight
    module = torch.nn.Sequential(embedding, head)
    judge = Judge(embedding.weight)
    opt = ChildAdamW(module.named_parameters(), lr=0.1, impl=place.impl)
    tokens = torch.tensor([1, 2, 2, 7], device=place.device)
    for _ in range(3):
        opt.zero_grad()
        module(tokens).square().sum().backward()
        judge.step(embedding.weight.grad, lr=0.1)
        opt.step()
    assert len(opt.state) == 1 and opt.state[head.weight]["step"].item() == 3
    judge.check(head.weight, *(opt.state[head.weight][k] for k in ("exp_avg", "exp_avg_sq")))


# ---- what moves between steps ---------------------------------------------------------------------------------------


def test_replaced_parameter_data_is_followed(place):
    """``p.data = ...`` gives another address, here at an odd offset and with other strides, under the same object."""
    named, plain = model(place.device), model(place.device)
    opt, reference = (optimizer(n, "F", impl=place.impl) for n in (named, plain))
    for t, change in enumerate([torch.clone, _misaligned, _strided, _transposed, torch.clone], start=1):
        old = [p.data for _, p in named]
        for _, param in named:
            param.data = change(param.data)
        frozen = snapshot(old)
        train(opt, named, [t])
        train(reference, plain, [t])
        assert unchanged(frozen, old), "the old storage was written"
    assert same_training(named, opt, plain, reference)


def test_replaced_data_of_another_shape_is_refused(place):
    named = model(place.device)
    opt = optimizer(named, impl=place.impl)
    train(opt, named, [1])
    param = named[1][1]
    param.grad = None
    param.data = param.data.reshape(31, 33).clone()
    set_grads(named, 2)
    before = weights_of(named) + snapshot(state_of(opt))
    with pytest.raises(
        RuntimeError, match=r"state of 'layer.weight': exp_avg must have shape \(31, 33\).* got \(33, 31\)"
    ):
        opt.step()
    assert unchanged(before, weights_of(named) + state_of(opt))


def test_a_module_cast_between_steps_goes_on(place):
    """module.to(bfloat16) swaps p.data and p.grad; fp32 moments stay."""
    named, plain = model(place.device), model(place.device)
    opt, reference = (optimizer(n, impl=place.impl) for n in (named, plain))
    for o, n in ((opt, named), (reference, plain)):
        train(o, n, [1])
    for _, param in named:
        param.data = param.data.bfloat16()
        param.grad = None
    cast = [(name, torch.nn.Parameter(p.detach().bfloat16())) for name, p in plain]
    fresh = optimizer(cast, impl=place.impl)
    fresh.load_state_dict(reference.state_dict())
    train(opt, named, [2])
    train(fresh, cast, [2])
    assert same_training(named, opt, cast, fresh) and named[0][1].dtype == torch.bfloat16


def test_gradients_reallocated_at_the_same_address(place):
    """The allocator hands a freed gradient's memory to another one of other size."""
    named, plain = model(place.device), model(place.device)
    opt, reference = (optimizer(n, impl=place.impl) for n in (named, plain))
    arena = torch.zeros(8192, device=place.device)
    for t in range(1, 5):
        set_grads(plain, t)
        reference.step()
        order = list(range(5))[:: 1 if t % 2 else -1]
        start = 0
        for i in order:
            param = named[i][1]
            view = arena[start : start + param.numel()].view(param.shape)
            view.copy_(plain[i][1].grad)
            param.grad, start = view, start + param.numel()
        opt.step()
    assert same_training(named, opt, plain, reference)


def test_state_tensors_replaced_by_the_user(place):
    named, plain = model(place.device), model(place.device)
    opt, reference = (optimizer(n, "F", impl=place.impl) for n in (named, plain))
    train(opt, named, [1])
    train(reference, plain, [1])
    old = state_of(opt)
    for _, param in named:
        opt.state[param] = {key: value.clone() for key, value in opt.state[param].items()}
    frozen = snapshot(old)
    train(opt, named, [2])
    train(reference, plain, [2])
    assert unchanged(frozen, old) and same_training(named, opt, plain, reference)
    name, param = named[1]
    opt.state[param]["exp_avg"] = torch.zeros(5, device=place.device)
    set_grads(named, 3)
    before = weights_of(named)
    with pytest.raises(RuntimeError, match=rf"state of '{name}': exp_avg must have shape \(33, 31\).* got \(5,\)"):
        opt.step()
    assert unchanged(before, weights_of(named))


@pytest.mark.parametrize("key", ["step", "exp_avg", "exp_avg_sq"])
def test_each_replaced_state_tensor_is_used(key, place):
    """Putting another tensor there is writing its values into the old one."""
    named, plain = model(place.device), model(place.device)
    opt, reference = (optimizer(n, "F", impl=place.impl) for n in (named, plain))
    for o, n in ((opt, named), (reference, plain)):
        train(o, n, [1, 2])
    for (_, param), (_, other) in zip(named, plain, strict=True):
        opt.state[param][key] = opt.state[param][key] * 2
        reference.state[other][key].mul_(2)
    for o, n in ((opt, named), (reference, plain)):
        train(o, n, [3])
    assert same_training(named, opt, plain, reference)
    assert opt.state[named[0][1]]["step"].item() == (5 if key == "step" else 3)


def test_cleared_state_starts_anew(place):
    named, plain = model(place.device), model(place.device)
    opt, reference = (optimizer(n, "F", impl=place.impl) for n in (named, plain))
    train(opt, named, [1, 2])
    for (_, a), (_, b) in zip(named, plain, strict=True):
        b.data.copy_(a.data)
    opt.state.clear()
    train(opt, named, [3])
    train(reference, plain, [3])
    assert same_training(named, opt, plain, reference)


def test_gradients_are_not_kept_alive():
    named = model()
    opt = optimizer(named, "F")
    train(opt, named, [1])
    import weakref

    grads = [weakref.ref(p.grad) for _, p in named]
    opt.zero_grad()
    assert all(g() is None for g in grads)


def test_parameters_without_gradients_are_left_alone(place):
    named = model(place.device)
    named[1][1].requires_grad_(False)
    opt = optimizer(named, "F", impl=place.impl)
    before = weights_of(named)
    set_grads(named, 1)
    named[1][1].grad = named[4][1].grad = None
    opt.step()
    for i in range(5):
        assert same_bits(named[i][1], before[i]) == (i in (1, 4)) and (named[i][1] in opt.state) == (i not in (1, 4))
