"""Autograd functions of the user's that run a backward pass themselves: what they add to .grad is never left out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from childtune_kernels.fisher import estimate_fisher


class Recomputing(torch.autograd.Function):
    """A reentrant checkpoint; the module's parameters are no inputs, and what they get is added to .grad."""

    @staticmethod
    def forward(ctx, module, x, *others):
        ctx.module, ctx.x, ctx.others = module, x.detach(), len(others)
        return module(x)

    @classmethod
    def backward(cls, ctx, grad):
        x = ctx.x.requires_grad_()
        with torch.enable_grad():
            cls.accumulate(ctx.module, ctx.module(x), x, grad)
        return None, x.grad, *[None] * ctx.others

    @staticmethod
    def accumulate(module, out, x, grad):
        torch.autograd.backward(out, grad)


class Keeping(torch.autograd.Function):
    """The same with a graph that the forward pass keeps."""

    @staticmethod
    def forward(ctx, module, x, *others):
        ctx.x, ctx.others = x.detach().requires_grad_(), len(others)
        with torch.enable_grad():
            ctx.out = module(ctx.x)
        return ctx.out.detach()

    @staticmethod
    def backward(ctx, grad):
        torch.autograd.backward(ctx.out, grad)
        return None, ctx.x.grad, *[None] * ctx.others


class ByHand(Recomputing):
    """The same, with .grad written by hand."""

    @staticmethod
    def accumulate(module, out, x, grad):
        params = list(module.parameters())
        x.grad, *grads = torch.autograd.grad(out, [x, *params], grad)
        for param, own in zip(params, grads, strict=True):
            if param.grad is None:
                param.grad = own
            else:
                param.grad += own


class Opaque(Recomputing):
    """The same with a block's forward pass by memory, as kernels have it: no call gives a tensor of a parameter."""

    @staticmethod
    def forward(ctx, module, x, *others):
        ctx.module, ctx.x, ctx.others = module, x.detach(), len(others)
        weight, bias = (x.new_empty(0).set_(p.untyped_storage(), 0, p.size()) for p in module.parameters())
        return torch.tanh(x @ weight.T + bias)


class BackwardOnly(torch.autograd.Function):
    """A penalty on the parameters that only the backward pass knows of."""

    @staticmethod
    def forward(ctx, module, x, *others):
        ctx.module, ctx.others = module, len(others)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            penalty = sum(param.square().sum() for param in ctx.module.parameters())
        torch.autograd.backward(penalty, grad.sum())
        return None, grad, *[None] * ctx.others


class Declared(torch.autograd.Function):
    """Parameters are inputs and their gradients are returned: autograd sees all of it."""

    @staticmethod
    def forward(ctx, module, x, *params):
        ctx.module, ctx.x, ctx.params = module, x.detach(), params
        return module(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.x.requires_grad_()
        with torch.enable_grad():
            out = ctx.module(x)
        return None, *torch.autograd.grad(out, [x, *ctx.params], grad, allow_unused=True)


FUNCTIONS = [Recomputing, Keeping, ByHand, Opaque, BackwardOnly, Declared]
WRAPPED = {"first": [0], "middle": [1], "last": [2], "blocks": [0, 1, 2], "losses": [3], "all": [0, 1, 2, 3]}
EMBEDDING = ["in scope", "excluded", "frozen", "frozen, another input"]
MODES = [("exact", True), ("exact", False), ("batch", True), ("released", True)]
CASES = [  # without the check BackwardOnly is not seen, as estimate_fisher's docstring says
    (function, wrapped, rule, check)
    for function in FUNCTIONS
    for wrapped, parts in WRAPPED.items()
    for rule, check in MODES
    if (check or function is not BackwardOnly) and not (function in (Opaque, BackwardOnly) and 3 in parts)
]


class Losses(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.labels = None

    def forward(self, x):
        return F.cross_entropy(self.head(x.mean(1)), self.labels, reduction="none")


class Model(nn.Module):
    """An embedding, three blocks and the losses, of which a function wraps some."""

    def __init__(self, function, wrapped, another=False):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.parts = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)), Losses())
        self.function, self.wrapped, self.another = function, wrapped, another

    def forward(self, ids, labels):
        self.parts[3].labels = labels
        x = self.embed(ids)
        for i, part in enumerate(self.parts):
            others = part.parameters() if self.function is Declared else []
            others = [*others, torch.zeros((), requires_grad=True)] if self.another else others
            x = self.function.apply(part, x, *others) if i in self.wrapped else part(x)
        return x


def loss(model, batch):
    return model(*batch)


def batches():
    draw = torch.Generator().manual_seed(1)
    return [(torch.randint(0, 7, (n, 5), generator=draw), torch.randint(0, 3, (n,), generator=draw)) for n in (3, 1, 2)]


def plain(model, rule):
    """Return the sums by loss.backward(): of single examples, or of batches' means."""
    sums = {name: torch.zeros_like(param) for name, param in model.named_parameters()}
    for ids, labels in batches():
        parts = [slice(j, j + 1) for j in range(len(ids))] if rule == "exact" else [slice(None)]
        for part in parts:
            model.zero_grad()
            model(ids[part], labels[part]).mean().backward()
            for name, param in model.named_parameters():
                sums[name] += 0 if param.grad is None else param.grad.square()
    model.zero_grad()
    return sums


def build(function, wrapped, embedding):
    torch.manual_seed(0)
    model = Model(function, WRAPPED[wrapped], embedding == "frozen, another input").double()
    model.embed.requires_grad_(not embedding.startswith("frozen"))
    return model, dict(exclude=["embed.weight"] if embedding == "excluded" else [])


@pytest.mark.parametrize("embedding", EMBEDDING)
@pytest.mark.parametrize("function, wrapped, rule, check", CASES)
def test_as_backward_or_refused(function, wrapped, embedding, rule, check):
    """Every sum is what loss.backward() gives, or an error names a parameter of a wrapped part."""
    model, options = build(function, wrapped, embedding)
    try:
        expected = plain(model, rule)
    except RuntimeError:
        expected = None  # nothing that the losses depend on is trained, as far as autograd sees
    refused = None
    try:
        fisher = estimate_fisher(
            model, batches(), loss, rule=rule, check=check, train_mode=False, max_grad_norm=1e9, **options
        )
    except (RuntimeError, ValueError) as error:
        refused = str(error)
    assert all(param.grad is None for param in model.parameters())
    if expected is None:
        assert "a function of losses that have a gradient" in refused
    elif refused is None:
        for name, value in fisher.sums.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-20, msg=lambda m, n=name: f"{n}: {m}")
    else:
        names = any(f"'parts.{i}." in refused for i in WRAPPED[wrapped])
        twice = function is Keeping and not check and "through the graph a second time" in refused  # torch's own
        assert function is not Declared and (names or twice), refused


@pytest.mark.parametrize("check", [True, False])
def test_what_backward_does_not_reach_has_no_gradient(check):
    """A checkpoint of inputs that need no gradient is no part of the graph, and its parameters are named."""
    model, _ = build(Recomputing, "first", "frozen")
    fisher = estimate_fisher(model, batches(), loss, check=check)
    blank = [name for name, note in fisher.notes.items() if note == "no gradient"]
    assert blank == ["parts.0.0.weight", "parts.0.0.bias"] == [n for n, s in fisher.sums.items() if not s.any()]
    with pytest.raises(ValueError, match="that the losses depend on, got .'parts.0.0.bias'"):
        estimate_fisher(model, batches(), loss, check=check, include=["parts.0.0.bias"])


@pytest.mark.parametrize("check", [True, False])
def test_only_some_batches(check):
    """What the first batch does not show is noticed in the one that does."""
    model, options = build(Recomputing, "first", "excluded")

    def some(model, batch):  # the second batch's one example is unlike those of the first
        model.wrapped = [0] if batch[0].equal(batches()[1][0]) else ()
        return loss(model, batch)

    with pytest.raises(RuntimeError, match="'parts.0.0.*turn activation checkpointing"):
        estimate_fisher(model, batches(), some, check=check, **options)


@pytest.mark.parametrize("function", [Recomputing, ByHand])
def test_gradients_stay(function):
    """Gradients that were there are the same tensors with the same values, refused or not."""
    model, _ = build(function, "middle", "in scope")
    before = {param: torch.randn_like(param) for param in model.parameters()}
    for param, grad in before.items():
        param.grad = grad
    values = [grad.clone() for grad in before.values()]
    with pytest.raises(RuntimeError, match="'parts.1.0.*turn activation checkpointing"):
        estimate_fisher(model, batches(), loss)
    model.wrapped = ()
    estimate_fisher(model, batches(), loss)
    assert all(param.grad is grad for param, grad in before.items())
    assert all(torch.equal(grad, value) for grad, value in zip(before.values(), values, strict=True))


def test_no_grad_alone_is_no_function():
    """A teacher's pass through the same weights leaves them their batched rules."""

    def distilled(model, batch):
        with torch.no_grad():
            weights = model(*batch)
        return weights * model(*batch)

    model, _ = build(Declared, "first", "in scope")
    model.wrapped = ()
    fisher = estimate_fisher(model, batches(), distilled)
    assert not any(note.startswith("one example") or note == "no gradient" for note in fisher.notes.values())
