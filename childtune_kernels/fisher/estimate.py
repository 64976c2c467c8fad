"""`estimate_fisher`: the empirical Fisher information of every parameter, example by example (Eq. 10)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import names as naming
from .. import ops
from ..ops.checks import require
from .batches import count_examples, map_tensors, require_batch, take, tensors_of
from .context import borrowed, mode, random_state
from .information import Fisher
from .losses import LABELS
from .scope import backbone, chosen, left_out, warn_of_other_ranks
from .tape import Layout, Tape, find_layout

RULES = ("exact", "batch", "released")
_ALONE = "one example at a time: "


def estimate_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    per_example_loss: Callable[..., Tensor],
    *,
    rule: str = "exact",
    labels: str = "true",
    train_mode: bool | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    limit: int | None = None,
    check: bool = True,
    max_grad_norm: float = 1.0,
    graph: bool = False,
    progress: bool = False,
) -> Fisher:
    """Estimate F = 1/|D| sum over examples of (d log p(y | x) / d w)**2 for every trained weight.

    Model mode, buffers, gradients and requires_grad are afterwards as they were, so is the random state of torch, numpy
    and python, whatever the loader draws from it, and nothing is set on the model's modules. Gradient checkpointing is
    left out during the pass: memory is that of a pass without it.

    Args:
        model: the pretrained model.
        batches: anything whose tensors, in mappings, lists or tuples, have the example as their first dimension.
        per_example_loss: called as ``per_example_loss(model, batch)``, or with ``labels=`` where that is not "true";
            returns [B], one loss an example, each of its own example only. It moves the batch to the device.
        rule: "exact": Eq. 10. "batch": squares of each batch's mean gradient, averaged over batches; "released": the
            same with each tensor's gradient clipped to ``max_grad_norm`` first and dropout on, as the released code.
        labels: "true" (the paper's), "sampled" from the model, or "predicted"; the loss must take ``labels=``.
        train_mode: dropout on; by default only in rule "released".
        include: names to estimate, with or without a wrapper's prefixes; by default all that require a gradient.
        exclude: names to leave out. What trains but is not estimated is in no mask: it is trained fully.
        limit: stop after this many batches.
        check: compare two examples in one batch with each alone, first; a parameter for which they differ is then
            estimated one example at a time.
        graph: capture the pass in a CUDA graph, rule "exact": for batches of one shape and a loss function that never
            waits for the device; batches of another shape run as usual.
        progress: show a bar (needs tqdm).

    Returns:
        `Fisher`: sums in float32 (float64 for float64 weights) by the bare model's names, and how many terms they have.
        Where torch.distributed runs several ranks, it is of this rank's batches.

    Raises:
        ValueError: losses that are not [B], not finite, or depend on other examples; no batch; a name in ``include``
            that the model does not have, that is frozen, or that no loss depends on; BatchNorm in training mode;
            single examples in place of batches; sharded, placeholder or meta parameters; complex ones.
    """
    require("rule", rule, rule in RULES, f"one of {RULES}")
    require("labels", labels, labels in LABELS, f"one of {LABELS}")
    require("limit", limit, limit is None or limit > 0, "a positive number of batches or None")
    train_mode = rule == "released" if train_mode is None else train_mode
    params = chosen(model, include, exclude)
    if train_mode:
        _refuse_batch_norm(model)
    warn_of_other_ranks()
    with random_state(), borrowed(model, train_mode):
        iterator = iter(batches)  # a loader that shuffles draws here already
        first = next(iterator, None)
        require("batches", [], first is not None, "at least one batch")
        require_batch(first, batches)
        stream = itertools.islice(itertools.chain([first], iterator), limit)
        if progress:
            from tqdm import tqdm

            stream = tqdm(stream, desc="Fisher information", unit="batch")
        losses = _Losses(model, per_example_loss, labels)
        if rule == "exact":
            count_examples(first)  # refused here, before the model fails on it
            sums, count, notes = _Exact(params, losses, graph).run(first, stream, check)
        else:
            clip = max_grad_norm if rule == "released" else None
            sums, count, notes = _square_batches(params, losses, stream, clip)
    losses.require_finite()
    unused = [name for name in params if notes[name] == "no gradient"] if include is not None else []
    require("include", unused, not unused, "names of parameters that the losses depend on")
    scope = dict(backbone=backbone(model, params), left_out=left_out(model, params))
    return Fisher(sums, count, rule=rule, notes=notes, **scope)


class _Losses:
    """The user's loss function, with what it returns looked at."""

    def __init__(self, model: nn.Module, function: Callable[..., Tensor], labels: str):
        self.model = model
        self.function = function
        self.options = {} if labels == "true" else {"labels": labels}
        self.finite: list[Tensor] = []

    def __call__(self, batch: Any, true_labels: bool = False) -> Tensor:
        losses = self.function(self.model, batch, **({} if true_labels else self.options))
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        one_each = isinstance(losses, Tensor) and losses.dim() == 1
        require("per_example_loss", shape, one_each, 'a function returning [B], as with reduction="none"')
        return losses

    def counted(self, batch: Any) -> Tensor:
        """Return the losses; whether they were finite is read at the end, not to wait for the device here."""
        losses = self(batch)
        self.finite.append(losses.detach().isfinite().all())
        return losses

    def require_finite(self) -> None:
        bad = [i for i, ok in enumerate(self.finite) if not ok]
        require("per_example_loss", f"NaN or infinity in batches {bad[:10]}", not bad, "finite in every batch")


class _Exact:
    """The exact rule: one batched pass with a tape, and single examples for what has no rule."""

    def __init__(self, params: dict[str, Tensor], losses: _Losses, graph: bool = False):
        self.params = params
        self.losses = losses
        self.graph = graph
        self.captured: _Captured | None = None
        self.ids = {id(p): name for name, p in naming.named_parameters(losses.model).items()}
        self.unruled: dict[str, str] = {}
        self.layout: Layout = {}
        self.sums = _zeros(params)
        self.notes: dict[str, str] = {}

    def run(self, first: Any, stream: Iterable[Any], check: bool) -> tuple[dict[str, Tensor], int, dict[str, str]]:
        self.learn(first, check)
        if self.graph:
            self.captured = _Captured(self, first)
        count = 0
        for batch in stream:
            count += self.add(batch, self.sums)
        notes = {name: self.notes.get(name, "no gradient") for name in self.params}
        notes |= {name: _ALONE + why for name, why in self.unruled.items()}
        return self.sums, count, notes

    def learn(self, first: Any, check: bool) -> None:
        """Find which dimensions go over examples by looking at one and at two, and check the result."""
        with torch.no_grad(), mode(self.losses.model, training=False):
            examples = len(self.losses(first, true_labels=True))
            pair = [take(first, [0], examples), take(first, [min(1, examples - 1)], examples)]
            both = take(first, [0, min(1, examples - 1)], examples)
            tapes = []
            for batch, size in ((pair[0], 1), (both, 2)):
                tapes.append(Tape(self.ids, self.params.keys(), size, self.unruled))
                with tapes[-1]:
                    self.losses(batch, true_labels=True)
        self.layout = find_layout(*tapes, self.unruled)
        if check:
            with mode(self.losses.model, training=False):
                self.check(pair, both)

    def check(self, pair: list[Any], both: Any) -> None:
        alone, expected = [], _zeros(self.params)
        for example in pair:
            losses = self.losses(example, true_labels=True)
            alone.append(losses.detach())
            self.square_gradients(losses.sum(), list(self.params), expected)
        with torch.no_grad():
            together = self.losses(both, true_labels=True)
        noise = _noise(together)
        alone = torch.cat(alone)
        same = alone.shape == together.shape and torch.allclose(alone, together, rtol=16 * noise, atol=16 * noise)
        got = f"{together.tolist()} for two examples together and {alone.tolist()} for each alone"
        require("per_example_loss", got, same, "a function whose losses depend on their own example only")
        found = _zeros(self.params)
        self.add_batched(both, found, lambda batch: self.losses(batch, true_labels=True))
        share = max(0.01, 16 * noise)  # a wrong rule is wrong by tens of percent, rounding by noise times some depth
        floor = 10 * noise**2 * max(float(e.norm()) for e in expected.values())  # rounding of gradients that are 0
        for name, value in expected.items():
            if name not in self.unruled and float((found[name] - value).norm()) > share * float(value.norm()) + floor:
                self.unruled[name] = "the batched rule disagreed with single examples"

    def add(self, batch: Any, sums: dict[str, Tensor]) -> int:
        """Add one batch's squares to ``sums`` and return how many examples it had."""
        if self.captured is not None and self.captured.fits(batch):
            examples = self.captured.replay(batch)
        else:
            examples = self.add_batched(batch, sums, self.losses.counted)
        if self.unruled:
            names = list(self.unruled)
            for j in range(examples):
                self.square_gradients(self.losses(take(batch, [j], examples)).sum(), names, sums)
        return examples

    def add_batched(self, batch: Any, sums: dict[str, Tensor], loss: Callable[[Any], Tensor]) -> int:
        known = set(self.unruled)
        tape = Tape(self.ids, self.params.keys(), count_examples(batch), self.unruled, self.layout, sums)
        with tape:
            losses = loss(batch)
        require("per_example_loss", f"{len(losses)} losses", len(losses) == tape.examples,
                 f"a function returning one loss for each of the batch's {tape.examples} examples")  # fmt: skip
        if new := set(self.unruled) - known:
            raise RuntimeError(f"the model uses {sorted(new)} in this batch as it did not in the first: exclude them")
        tape.backward(losses)
        self.notes.update({n: r for n, r in tape.rules.items() if r != "no gradient" or n not in self.notes})
        return tape.examples

    def square_gradients(self, loss: Tensor, names: list[str], sums: dict[str, Tensor]) -> None:
        """Add the squared gradient of one example's loss, for the named parameters."""
        grads = torch.autograd.grad(loss, [self.params[n] for n in names], allow_unused=True)
        _square_into([sums[n] for n in names], grads, 1.0)


class _Captured:
    """One batch's pass as a CUDA graph: the launches without Python between them."""

    def __init__(self, exact: _Exact, batch: Any):
        self.exact = exact
        device = next(iter(exact.params.values())).device
        require("graph", True, device.type == "cuda", f"False for a model on {device.type}")
        self.batch = map_tensors(batch, lambda t: t.to(device, copy=True))
        self.graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            self.run()  # compiles and allocates what a capture must not
        torch.cuda.current_stream(device).wait_stream(side)
        with torch.cuda.graph(self.graph):
            self.run()
        self.finite = exact.losses.finite[-1]
        del exact.losses.finite[:]
        for total in exact.sums.values():
            total.zero_()

    def run(self) -> None:
        self.examples = self.exact.add_batched(self.batch, self.exact.sums, self.exact.losses.counted)

    def fits(self, batch: Any) -> bool:
        return [(t.shape, t.dtype) for t in tensors_of(batch)] == [(t.shape, t.dtype) for t in tensors_of(self.batch)]

    def replay(self, batch: Any) -> int:
        for own, new in zip(tensors_of(self.batch), tensors_of(batch), strict=True):
            own.copy_(new, non_blocking=True)
        self.graph.replay()
        self.exact.losses.finite.append(self.finite.clone())
        return self.examples


def _square_batches(params, losses: _Losses, stream: Iterable[Any], clip: float | None):
    """Sum over batches of the squared gradient of the batch's mean loss."""
    sums = _zeros(params)
    used: set[str] = set()
    count = 0
    for batch in stream:
        loss = losses.counted(batch).mean()
        grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
        used.update(name for name, grad in zip(params, grads, strict=True) if grad is not None)
        if clip is not None:  # a tensor at a time, as the released code
            norms = [None if g is None else torch.linalg.vector_norm(g, dtype=_sum_dtype(g)) for g in grads]
            grads = [
                None if g is None else g * (clip / (norm + 1e-6)).clamp(max=1.0).to(g.dtype)
                for g, norm in zip(grads, norms, strict=True)
            ]
        _square_into(list(sums.values()), grads, 1.0)
        count += 1
    return sums, count, {n: "squared batch gradient" if n in used else "no gradient" for n in params}


def _square_into(sums: list[Tensor], grads, scale: float) -> None:
    """sums += scale * grads**2 where there is a gradient: one launch for float32 sums of one device."""
    by_device: dict[torch.device, tuple[list, list]] = {}
    for total, grad in zip(sums, grads, strict=True):
        if grad is None:
            continue
        if total.dtype == torch.float64:
            total.addcmul_(grad, grad, value=scale)
        else:
            totals, own = by_device.setdefault(total.device, ([], []))
            totals.append(total)
            own.append(grad.detach().contiguous())
    for totals, own in by_device.values():
        ops.square_accumulate_(totals, own, scale)


def _refuse_batch_norm(model: nn.Module) -> None:
    found = [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    require("train_mode", True, not found, f"False for a model with batch norm, which mixes examples: {found[:3]}")


def _zeros(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros(p.shape, dtype=_sum_dtype(p), device=p.device) for name, p in params.items()}


def _sum_dtype(param: Tensor) -> torch.dtype:
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def _noise(losses: Tensor) -> float:
    """Return the relative rounding error to expect of gradients: that of the dtype in which products are computed."""
    dtype = torch.get_autocast_dtype(losses.device.type) if torch.is_autocast_enabled(losses.device.type) else None
    return torch.finfo(dtype or losses.dtype).eps
