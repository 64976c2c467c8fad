"""Memory: what is predicted is what there is."""

from __future__ import annotations

import gc

import pytest
import torch
from cases import MODEL, child_mask, model, optimizer, set_grads, train
from torch import nn

from childtune_kernels import ChildAdamW, ChildMask
from childtune_kernels.optim.gradients import TOGETHER
from childtune_kernels.optim.memory import predict

N = sum(torch.Size(shape).numel() for shape in MODEL.values())
INSIDE = sum(child_mask().count(n) if n in child_mask() else torch.Size(s).numel() for n, s in MODEL.items())
COUNTS = {name: child_mask().count(name) for name in child_mask()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("low_precision", ["master", "kahan", "nearest"])
@pytest.mark.parametrize("kind", ["plain", "F", "D", "D, dense"])
def test_prediction_equals_measurement(kind, low_precision, dtype):
    if kind == "D, dense":
        low_precision = "nearest"
    named = model(dtype=dtype)
    opt = optimizer(named, kind, low_precision=low_precision)
    train(opt, named, [1])
    options = dict(p=COUNTS, state="dense" if "dense" in kind else "packed") if "D" in kind else {}
    assert opt.memory() == predict(MODEL, weight_dtype=dtype, low_precision=low_precision, **options)


def test_by_hand():
    memory = predict({"a": (100, 10), "b": (24,)}, p=0.1, weight_dtype=torch.bfloat16)
    child = 100 + 2
    assert (memory.parameters, memory.weights, memory.gradients) == (1024, 2048, 2048)
    assert (memory.moments, memory.companions, memory.indices) == (8 * child + 16, 4 * child, 4 * child)
    assert memory.mask == 128 and memory.total == 2 * 2048 + 16 * child + 16
    assert predict({"a": (100, 10), "b": (24,)}).moments == 8 * 1024 + 16
    assert predict({"a": (100, 10), "b": (24,)}, p=0.1, pack_gradients=True).gradients == 4 * (102 + 1024)
    large = {"a": (10_000, 10_000), "b": (10_000, 10_000)}
    assert predict(large, p=0.1, pack_gradients=True).gradients == 4 * (2 * 10**7 + 10**8) + TOGETHER
    assert predict({"a": (100, 10), "b": (24,)}, fused_backward=True).gradients == 4 * 1000
    assert "1024" not in str(memory) and "total" in str(memory)
    kinds = ["weights", "gradients", "moments", "companions", "indices", "mask", "state", "total"]
    assert list(memory.per_parameter()) == kinds and memory.per_parameter()["weights"] == 2
    assert memory.per_parameter()["state"] == (16 * child + 16) / 1024
    head, weights, *_, total = str(predict({"a": (1_000_000,)})).split("\n")
    assert head == "                       MB   B a weight"
    assert (weights, total) == ("weights               4.0        4.000", "total                16.0       16.000")
    empty = predict({}, fused_backward=True)
    assert empty.total == 0 and set(empty.per_parameter().values()) == {0}


def test_by_hand_of_named_children():
    """``a`` has 10 of its 1000 weights in the child, ``b`` all and ``c``, unnamed, too."""
    shapes = {"a": (100, 10), "b": (24,), "c": (6,)}
    memory = predict(shapes, p={"a": 10, "b": 24}, weight_dtype=torch.float16, low_precision="kahan")
    assert (memory.moments, memory.companions, memory.indices, memory.mask) == (8 * 40 + 24, 2 * 40, 4 * 10, 128)
    memory = predict(shapes, p={"a": 10, "b": 24}, pack_gradients=True)
    assert memory.gradients == 4 * (40 + 1000) and memory.companions == 0
    memory = predict(shapes, p={"a": 10}, state="dense", state_dtype=torch.bfloat16, low_precision="nearest")
    assert (memory.moments, memory.indices, memory.mask) == (4 * 1030 + 24, 0, 125)
    assert predict(shapes, p=1.0).indices == predict(shapes, weight_dtype=torch.bfloat16).companions == 0


def test_a_tenth_of_the_state():
    """1.2 bytes a weight where AdamW has 8, and the mask's bit, which the CPU holds."""
    memory = predict({"w": (10_000, 100)}, p=0.1)
    assert memory.state == 1_200_000 + 8 and memory.mask == 125_000


def test_packed_gradients_are_counted():
    layer = nn.Linear(8, 8, bias=False)
    opt = ChildAdamW(
        layer.named_parameters(), mask=ChildMask.from_dense({"weight": torch.eye(8).bool()}), pack_gradients=True
    )
    layer(torch.ones(1, 8)).sum().backward()
    assert opt.memory().gradients == 4 * 64  # it waits to be packed
    opt.hooks.pack()
    assert opt.memory().gradients == 4 * 8
    opt.step()
    memory = opt.memory()
    assert memory.gradients == 0 and memory.moments == 2 * 4 * 8 + 8 and memory.indices == 4 * 8


def test_before_the_first_step():
    named = model()
    opt = optimizer(named, "D")
    assert opt.memory().moments == opt.memory().gradients == 0
    set_grads(named, 1)
    assert opt.memory().gradients == 4 * N


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(state="packed"), "state must be 'dense' where decay='child' or there is no mask: .*, got 'packed'"),
        (dict(p=0.0), r"p must be in \(0, 1\], got 0.0"),
        (dict(p=0.1, low_precision="x"), "low_precision must be one of"),
        (dict(pack_gradients=True), "pack_gradients must be False where the state is not packed, got True"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        predict(MODEL, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["plain", "D", "D, packed gradient"])
def test_the_device_agrees(kind, dtype):
    layer = nn.Linear(8, 8).to("cuda", dtype)
    layer(torch.ones(4, 8, device="cuda", dtype=dtype)).sum().backward()  # cuBLAS takes its workspace
    del layer
    gc.collect()
    torch.cuda.empty_cache()
    start = torch.cuda.memory_allocated()
    net = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(24))).to("cuda", dtype)
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    options = {}
    if kind != "plain":
        bits = {n: torch.rand(s) < 0.1 for n, s in shapes.items()}
        options = dict(mask=ChildMask.from_dense(bits), pack_gradients="gradient" in kind)
    opt = ChildAdamW(net.named_parameters(), **options)
    net(torch.ones(4, 1024, device="cuda", dtype=dtype)).float().sum().backward()
    opt.step()
    gc.collect()
    used = torch.cuda.memory_allocated() - start
    counts = {n: opt.mask.count(n) for n in opt.mask} if options else None
    expected = predict(shapes, weight_dtype=dtype, p=counts)
    held = expected.weights + expected.state + (opt.memory().gradients if options else expected.gradients)
    assert used == pytest.approx(held, rel=0.02) and opt.memory().total == held
