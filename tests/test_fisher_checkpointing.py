"""Activation checkpointing during a Fisher pass: left out, whatever its make, or refused; never silently wrong."""

from __future__ import annotations

import threading
from functools import partial

import models
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint as checkpointing
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, create_selective_checkpoint_contexts

from childtune_kernels.fisher import classification_loss, estimate_fisher

PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]


class Block(nn.Module):
    """Dropout for the random state, a residual for a second path, one weight by two uses; it counts its calls."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.inner = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.randn(6))
        self.dropout = nn.Dropout(0.3)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x = x + self.dropout(torch.tanh(self.inner(self.norm(x))))
        return x + self.scale * torch.tanh(self.inner(x))


class Stack(nn.Module):
    """Blocks under a way to call them, ``run(blocks, x)``."""

    def __init__(self, run):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.blocks = nn.Sequential(Block(), Block(), Block())
        self.head = nn.Linear(6, 3)
        self.run = run

    def forward(self, ids):
        return self.head(self.run(self.blocks, self.embed(ids)).mean(1))


def plain(blocks, x):
    return blocks(x)


def each(call, blocks, x):
    for block in blocks:
        x = call(block, x)
    return x


def nested(inner: bool, outer: bool, blocks, x):
    return checkpoint(partial(each, partial(checkpoint, use_reentrant=inner), blocks), x, use_reentrant=outer)


def in_sequence(reentrant, blocks, x):
    return checkpoint_sequential(blocks, 2, x, use_reentrant=reentrant)


def wrapped(kind, blocks, x):
    return each(lambda block, x: checkpoint_wrapper(block, checkpoint_impl=kind)(x), blocks, x)


class HandMade(torch.autograd.graph.saved_tensors_hooks):
    """Somebody's own checkpoint by saved-tensor hooks: it recomputes without looking at what comes out."""

    def __init__(self, function, x):
        self.saved = []
        self.recomputed = None

        def pack(tensor):
            self.saved.append(tensor.shape)
            return len(self.saved) - 1

        def unpack(place):
            if self.recomputed is None:
                self.recomputed = []
                keep = torch.autograd.graph.saved_tensors_hooks(self.recomputed.append, lambda tensor: tensor)
                with torch.enable_grad(), keep:
                    function(x.detach().requires_grad_())
            return self.recomputed[place]

        super().__init__(pack, unpack)


def hand_made(function, x):
    with HandMade(function, x):
        return function(x)


class HandMadeReentrant(torch.autograd.Function):
    """Somebody's own reentrant checkpoint, which accumulates into parameters inside the backward pass."""

    @staticmethod
    def forward(ctx, function, x):
        ctx.function, ctx.x = function, x.detach()
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.x.requires_grad_()
        with torch.enable_grad():
            out = ctx.function(x)
        torch.autograd.backward(out, grad)
        return None, x.grad


class Policy:
    @staticmethod
    def save_products(ctx, op, *args, **kwargs):
        kinds = checkpointing.CheckpointPolicy
        return kinds.MUST_SAVE if op in PRODUCTS else kinds.PREFER_RECOMPUTE


def contexts():
    return torch.autocast("cpu", enabled=False), torch.autocast("cpu", enabled=False)


def by(**options):
    return partial(each, partial(checkpoint, **options))


WAYS = {
    "reentrant": by(use_reentrant=True),
    "non-reentrant": by(use_reentrant=False),
    "unchecked": by(use_reentrant=False, determinism_check="none"),
    "to-the-end": by(use_reentrant=False, early_stop=False),
    "other-noise": by(use_reentrant=False, preserve_rng_state=False),
    "contexts": by(use_reentrant=False, context_fn=contexts),
    "selective": by(use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, PRODUCTS)),
    "policy": by(use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, Policy.save_products)),
    "sequential": partial(in_sequence, False),
    "sequential-reentrant": partial(in_sequence, True),
    "wrapper": partial(wrapped, CheckpointImpl.NO_REENTRANT),
    "wrapper-reentrant": partial(wrapped, CheckpointImpl.REENTRANT),
    "hand-made": partial(each, hand_made),
    **{f"nested-{i}-{o}": partial(nested, i, o) for i in (False, True) for o in (False, True)},
}


def loss(model, batch):
    return F.cross_entropy(model(batch["ids"]), batch["labels"], reduction="none")


def batches():
    draw = torch.Generator().manual_seed(1)
    sizes = ((3, 5), (2, 7), (1, 4))
    return [
        {"ids": torch.randint(0, 11, size, generator=draw), "labels": torch.randint(0, 3, size[:1], generator=draw)}
        for size in sizes
    ]


def estimate(run, **options):
    """Return the Fisher information and how often each block was called."""
    torch.manual_seed(0)
    model = Stack(run).double()
    torch.manual_seed(1)
    fisher = estimate_fisher(model, batches(), loss, **options)
    assert all(p.grad is None for p in model.parameters())
    return fisher, [block.calls for block in model.blocks]


def assert_equal(fisher, expected):
    assert fisher.notes == expected.notes and set(fisher) == set(expected)
    assert all(torch.equal(fisher.sums[name], value) for name, value in expected.sums.items())


OPTIONS = (dict(), dict(train_mode=True, check=False), dict(rule="batch"), dict(rule="released"))


@pytest.mark.parametrize("options", OPTIONS, ids=["exact", "dropout", "batch", "released"])
@pytest.mark.parametrize("way", WAYS)
def test_left_out(way, options):
    """Bit for bit the pass without checkpoints, and no block is called once more."""
    fisher, calls = estimate(WAYS[way], **options)
    expected, expected_calls = estimate(plain, **options)
    assert_equal(fisher, expected)
    assert calls == expected_calls


def test_left_out_as_a_decorator():
    try:
        decorated = checkpoint(use_reentrant=False)(Block.forward)
    except TypeError:
        pytest.skip("this torch's checkpoint is no decorator")
    assert_equal(estimate(partial(each, decorated))[0], estimate(plain)[0])


def test_left_out_of_hooked_modules():
    composable = pytest.importorskip("torch.distributed._composable").checkpoint
    torch.manual_seed(0)
    model = Stack(plain).double()
    for block in model.blocks:
        composable(block)
    torch.manual_seed(1)
    assert_equal(estimate_fisher(model, batches(), loss), estimate(plain)[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_left_out_of_transformers(reentrant):
    model, own = models.build("bert"), [models.batch("bert", 3, 5)]
    torch.manual_seed(0)
    off = estimate_fisher(model, own, classification_loss, train_mode=True, check=False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.manual_seed(0)
    assert_equal(estimate_fisher(model, own, classification_loss, train_mode=True, check=False), off)


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("rule", ["exact", "batch"])
def test_refuses_what_recomputes_all_the_same(rule, check):
    torch.manual_seed(0)
    model = Stack(partial(each, HandMadeReentrant.apply)).double()
    with pytest.raises(RuntimeError, match="'blocks.2.*turn activation checkpointing"):
        estimate_fisher(model, batches(), loss, rule=rule, check=check)
    assert all(p.grad is None for p in model.parameters())
    loss(model, batches()[0]).sum().backward()  # nothing is left behind
    assert all(p.grad is not None for p in model.parameters())


def test_refuses_a_loss_that_accumulates():
    def impatient(model, batch):
        losses = loss(model, batch)
        if torch.is_grad_enabled():
            losses.sum().backward(retain_graph=True)
        return losses

    model = Stack(plain).double()
    model.head.bias.grad = torch.ones(3).double()
    with pytest.raises(RuntimeError, match="received a gradient from a backward pass inside the loss"):
        estimate_fisher(model, batches(), impatient)
    assert torch.equal(model.head.bias.grad, torch.ones(3).double())
    assert model.head.weight.grad is None


def test_refuses_hooks_set_another_way():
    """What does not go through torch's class of hooks cannot be left out, and is noticed."""

    def run(blocks, x):
        torch._C._autograd._push_saved_tensors_default_hooks(lambda t: t, lambda t: t)
        try:
            return blocks(x)
        finally:
            torch._C._autograd._pop_saved_tensors_default_hooks()

    with pytest.raises(RuntimeError, match="turn activation checkpointing or offloading off"):
        estimate(run)


@pytest.mark.parametrize("options", OPTIONS, ids=["exact", "dropout", "batch", "released"])
def test_refuses_hooks_around_the_call(options):
    keep = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    for hooks in (torch.autograd.graph.save_on_cpu(), keep):
        with hooks, pytest.raises(RuntimeError, match="turn activation checkpointing or offloading off"):
            estimate(plain, **options)


def test_torch_is_as_it_was():
    hooks, reentrant = torch.autograd.graph.saved_tensors_hooks, checkpointing.CheckpointFunction
    before = dict(vars(hooks)), dict(vars(reentrant))
    estimate(plain)
    with pytest.raises(ZeroDivisionError):
        estimate(lambda blocks, x: 1 / 0)
    assert before == (dict(vars(hooks)), dict(vars(reentrant)))
    block = Block().double()
    for way in (True, False):
        block.calls = 0
        checkpoint(block, torch.randn(2, 6).double().requires_grad_(), use_reentrant=way).sum().backward()
        assert block.calls == 2


def test_other_threads_keep_their_checkpoints():
    """A training thread recomputes as ever while another thread estimates."""
    calls = {}

    def train(reentrant):
        block = Block().double()
        checkpoint(block, torch.randn(2, 6).double().requires_grad_(), use_reentrant=reentrant).sum().backward()
        calls[reentrant] = block.calls

    def run(blocks, x):
        for reentrant in (True, False):
            thread = threading.Thread(target=train, args=(reentrant,))
            thread.start()
            thread.join(30)
        return by(use_reentrant=False)(blocks, x)

    assert_equal(estimate(run)[0], estimate(plain)[0])
    assert calls == {True: 2, False: 2}
