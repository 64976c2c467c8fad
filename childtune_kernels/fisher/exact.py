"""The exact rule (Eq. 10): one batched pass, each parameter by its own rule, and single examples for what has none."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import require
from ..names import named_parameters
from . import owners
from .batches import count_examples, map_tensors, take, tensors_of
from .precision import rounding
from .restore import mode
from .tape import Layout, Tape, find_layout

_ALONE = "one example at a time: "
_SHARED = "an input shared by the batch, which the model repeats itself"


class Losses:
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


class Exact:
    """The exact rule: one batched pass with a tape, and single examples for what has no rule."""

    def __init__(self, params: dict[str, Tensor], losses: Losses, graph: bool = False):
        self.params = params
        self.losses = losses
        self.graph = graph
        self.captured: Captured | None = None
        self.ids = {id(p): name for name, p in (named_parameters(losses.model) | params).items()}
        self.unruled: dict[str, str] = {}
        self.layout: Layout = {}
        self.dtypes: set[torch.dtype] = set()
        self.in_order = False
        self.sums = zeros(params)
        self.notes: dict[str, str] = {}
        self.reached: set[str] = set()

    def run(self, first: Any, stream: Iterable[Any], check: bool) -> tuple[dict[str, Tensor], int, dict[str, str]]:
        self.learn(first, check)
        if self.graph:
            self.captured = Captured(self, first)
        count = 0
        try:
            for batch in stream:
                count += self.add(batch, self.sums)
        finally:
            self.captured = None  # a circle: freed at any later time, a graph would break the capture of another
        notes = {name: self.notes.get(name, "no gradient") for name in self.params}
        notes |= {name: _ALONE + why for name, why in self.unruled.items() if name in self.reached}
        return self.sums, count, notes

    def learn(self, first: Any, check: bool) -> None:
        """Find which dimensions go over examples by looking at one and at two, and check the result."""
        examples = count_examples(first)
        pair = [take(first, [0], examples), take(first, [min(1, examples - 1)], examples)]
        both = take(first, [0, min(1, examples - 1)], examples)
        with mode(self.losses.model, training=False):
            tapes = []
            for batch, size in ((pair[0], 1), (both, 2)):
                tapes.append(Tape(self.ids, self.params.keys(), size, self.unruled))
                with tapes[-1]:
                    losses = self.losses(batch, true_labels=True).detach()
            self.layout = find_layout(*tapes, self.unruled)
            self.dtypes = tapes[1].dtypes | {losses.dtype}
            self.leave_what_must_not_be_expanded(both, losses)
            if check:
                self.check(pair, both)

    def leave_what_must_not_be_expanded(self, both: Any, expected: Tensor) -> None:
        """Try inputs shared by the batch, expanded to it; leave them to single examples if the losses notice."""
        tape = Tape(self.ids, self.params.keys(), 2, self.unruled, self.layout)
        if not any(dims == (-1, -1) for dims in self.layout.values()):
            return
        try:
            with tape:
                found = self.losses(both, true_labels=True)
            right = self.close(found, expected)
        except Exception:  # of any kind: the shapes are not what the model expects
            right = False
        if not right:
            tape.leave(list(tape.expanded), _SHARED)

    def close(self, found: Tensor, expected: Tensor, same_shapes: bool = False) -> bool:
        """Return whether losses are the same but for rounding: of some operations, fewer in the same kernels."""
        noise = rounding(self.dtypes, found.device)
        noise = min(16 * noise, max(2 * noise, 16 * torch.finfo(torch.float32).eps)) if same_shapes else 16 * noise
        return found.shape == expected.shape and torch.allclose(found, expected, rtol=noise, atol=noise)

    def check(self, pair: list[Any], both: Any) -> None:
        alone, expected = [], zeros(self.params)
        for example in pair:
            losses = self.losses(example, true_labels=True)
            alone.append(losses.detach())
            self.square_gradients(losses.sum(), list(self.params), expected)
        together = self.losses(both, true_labels=True).detach()  # not in no_grad, where torch takes other paths
        noise = rounding(self.dtypes, together.device)
        alone = torch.cat(alone)
        beside = [self.losses(take(both, [j, j], 2), true_labels=True).detach()[:1] for j in (0, 1)]
        same = self.close(together, alone) and self.close(together, torch.cat(beside), same_shapes=True)
        got = f"{together.tolist()} for two examples together and {alone.tolist()} for each alone"
        require("per_example_loss", got, same, "a function whose losses depend on their own example only")
        found = zeros(self.params)
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
        tape = Tape(self.ids, self.params.keys(), count_examples(batch), self.unruled, self.layout, sums)
        try:
            with tape:
                losses = loss(batch)
        except Exception:  # a model that repeats a shared input itself fails on one that was expanded
            if not tape.expanded - self.unruled.keys():
                raise
            tape.leave(list(tape.expanded), _SHARED)
            return self.add_batched(batch, sums, loss)
        require("per_example_loss", f"{len(losses)} losses", len(losses) == tape.examples,
                 f"a function returning one loss for each of the batch's {tape.examples} examples")  # fmt: skip
        tape.backward(losses)
        self.in_order = tape.in_order
        self.notes.update({n: r for n, r in tape.rules.items() if r != "no gradient" or n not in self.notes})
        return tape.examples

    def square_gradients(self, loss: Tensor, names: list[str], sums: dict[str, Tensor]) -> None:
        """Add the squared gradient of one example's loss, for the named parameters."""
        grads = gradients(loss, [self.params[n] for n in names])
        self.reached.update(name for name, grad in zip(names, grads, strict=True) if grad is not None)
        square_into([sums[n] for n in names], grads, 1.0)


class Captured:
    """One batch's pass as a CUDA graph: the launches without Python between them.

    Nothing in a replay looks at whose rows are whose, so only a pass that needs no look is captured.
    """

    def __init__(self, exact: Exact, batch: Any):
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
        if exact.in_order:
            gc.collect()  # what frees device memory during a capture breaks it
            with torch.cuda.graph(self.graph):
                self.run()
        self.usable = exact.in_order
        self.finite = exact.losses.finite[-1]
        del exact.losses.finite[:]
        for total in exact.sums.values():
            total.zero_()

    def run(self) -> None:
        self.examples = self.exact.add_batched(self.batch, self.exact.sums, self.exact.losses.counted)

    def fits(self, batch: Any) -> bool:
        return self.usable and [(t.shape, t.dtype) for t in tensors_of(batch)] == [
            (t.shape, t.dtype) for t in tensors_of(self.batch)
        ]

    def replay(self, batch: Any) -> int:
        for own, new in zip(tensors_of(self.batch), tensors_of(batch), strict=True):
            own.copy_(new, non_blocking=True)
        self.graph.replay()
        self.exact.losses.finite.append(self.finite.clone())
        return self.examples


def gradients(loss: Tensor, params: list[Tensor]) -> list[Tensor | None]:
    """Return the gradients, dense, of one loss; None for what it does not depend on.

    All of the graph is visited, as by ``loss.backward()``: `borrowed` refuses what is accumulated on the way, which
    would be left out without a word if nobody came by.
    """
    require("per_example_loss", "losses without one", loss.requires_grad, "a function of losses that have a gradient")
    own = {id(param) for param in params}
    others = [leaf for leaf in owners.leaves_of(loss) if id(leaf) not in own]
    grads = torch.autograd.grad(loss, [*params, *others], allow_unused=True)[: len(params)]
    return [grad.to_dense() if grad is not None and grad.is_sparse else grad for grad in grads]


def square_into(sums: list[Tensor], grads: Iterable[Tensor | None], scale: float) -> None:
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


def zeros(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros(p.shape, dtype=sum_dtype(p), device=p.device) for name, p in params.items()}


def sum_dtype(param: Tensor) -> torch.dtype:
    return torch.float64 if param.dtype == torch.float64 else torch.float32
