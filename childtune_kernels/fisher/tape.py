"""What a model does with its parameters, seen from outside: a torch function mode, so nothing is set on the model.

Inside the mode a parameter is a constant to autograd, so no weight gradient is computed and `.grad` stays as it is.
Calls that use one (F.linear, einsum, a raw parameter added or multiplied ...) have a handler that records the use; a
call without one makes its parameters `unruled`, to be treated one example at a time by `estimate`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from . import owners, rules
from .handlers import handler_of
from .rules import Use

# (name, which use of it) -> the dimensions of (input, output) that go over examples; -1: none does
Layout = dict[tuple[str, int], tuple[int, int]]
_SHARED = (-1, -1)
_INSIDE = "used inside an autograd function, which may differentiate it itself"
_FORWARD, _CODED, _PLAIN = "forward", "coded", "plain"  # what the pass is at


@dataclass
class Output:
    """What one call made of parameters: their uses, and what coded passes brought of its gradient.

    Attributes:
        uses: name -> use; all of the same output.
        sketches: one a coded pass.
    """

    uses: dict[str, Use]
    sketches: list[Tensor] = field(default_factory=list)

    @property
    def dim(self) -> int:
        """The dimension over examples."""
        return next(iter(self.uses.values())).out_dim


class Tape(TorchFunctionMode):
    """Records uses; with ``totals``, squares and sums each as soon as the backward pass reaches it.

    Args:
        names: id(parameter) -> name, of all parameters of the model.
        wanted: the names to estimate; others are constants and no more.
        examples: B, the number of examples in the batch.
        layout: from `find_layout`; None records shapes only.
        totals: name -> accumulator.
        unruled: names that are left alone; a use without a handler adds its name, with the reason.
    """

    def __init__(
        self,
        names: dict[int, str],
        wanted: Collection[str],
        examples: int,
        unruled: dict[str, str],
        layout: Layout | None = None,
        totals: dict[str, Tensor] | None = None,
    ):
        super().__init__()
        self.names = names
        self.wanted = wanted
        self.examples = examples
        self.unruled = unruled
        self.layout = layout
        self.totals = totals
        self.shapes: dict[tuple[str, int], tuple[torch.Size, torch.Size]] = {}
        self.dtypes: set[torch.dtype] = set()
        self.expanded: set[str] = set()
        self.anchors: dict[torch.device, Tensor] = {}
        self.uses: dict[str, list[Use]] = defaultdict(list)
        self.counts: dict[str, int] = defaultdict(int)
        self.rules: dict[str, str] = {}
        self.in_order = False
        self.code: owners.Code | None = None
        self.owners: dict[str, Tensor] = {}
        self.stage = _FORWARD
        self.verdicts: dict[str, Tensor] = {}

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None):
        kwargs = kwargs or {}
        names = self.names
        for value in args:
            if id(value) in names or type(value) in (list, tuple):
                break
        else:
            if not kwargs or not any(id(value) in names for value in kwargs.values()):
                return func(*args, **kwargs)
        used = [value for value in _flat((args, kwargs.values())) if id(value) in names]
        if not used:
            return func(*args, **kwargs)
        inside = not forward_ad._is_fwd_grad_enabled()  # in an autograd function's forward, not under mere no_grad
        handler = None if inside else handler_of(func, args, kwargs)
        if handler is not None and any(map(self.active, used)):
            result = handler(self, func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*_detached(args, names), **_detached(kwargs, names))
        if inside or (isinstance(result, (Tensor, tuple, list)) and not isinstance(result, torch.Size)):
            why = _INSIDE if inside else f"no rule for {getattr(func, '__name__', func)}"
            self.leave([names[id(param)] for param in filter(self.active, used)], why)
        return result

    # ---- for handlers -----------------------------------------------------------------------------------------------

    def name(self, value: Any) -> str | None:
        """Return the name of a watched parameter, None for anything else."""
        return self.names.get(id(value))

    def active(self, param: Tensor) -> bool:
        """Return whether uses of a parameter are recorded."""
        name = self.names[id(param)]
        return name in self.wanted and name not in self.unruled

    def call(
        self, func: Callable, args: tuple, kwargs: dict, params: tuple, x: Tensor | None, make: Callable[..., list[Use]]
    ):
        """Run ``func`` on constants and record the uses of ``params`` that ``make(x, dims)`` describes.

        Args:
            args: of func, with parameters and with the input at position 0 where x is not None.
            params: the parameters used, in the order of ``make``'s result; None stands for an absent one.
            make: given the input as used and (input, output) dimensions over examples; one `Use` a parameter.
        """
        present = [p for p in params if p is not None]
        watched = [self.names[id(p)] if self.active(p) else None for p in present]
        keys = [(name, self.counts[name]) for name in watched if name]
        for name, _ in keys:
            self.counts[name] += 1
        dims = None
        if self.layout is not None:
            dims = self.layout.get(keys[0]) if all(key in self.layout for key in keys) else None
            if dims == _SHARED and x.shape[:1] == (1,):  # like position ids: one copy an example
                x = x.expand(self.examples, *x.shape[1:])
                args = (x, *args[1:])
                dims = (0, 0)
                self.expanded.update(name for name, _ in keys)
        out = func(*_detached(args, self.names), **_detached(kwargs, self.names))
        self.dtypes.add(out.dtype)
        if self.layout is None:
            for key in keys:
                self.shapes[key] = (torch.Size() if x is None else x.shape, out.shape)
            return self.start(out)
        made = make(x, dims) if dims is not None and self.fits(x, out, dims) else [None]
        if None in made:
            self.leave([name for name, _ in keys], "used by this batch in another way than by the first")
            return out
        uses = {name: use for name, use in zip(watched, made, strict=True) if name}
        for name, use in uses.items():
            self.uses[name].append(use)
        if torch.is_grad_enabled():
            out = self.start(out)
            out.register_hook(partial(self.receive, Output(uses)))
        return out

    def fits(self, x: Tensor | None, out: Tensor, dims: tuple[int, int]) -> bool:
        """Return whether what the layout says of a use is possible for the shapes that came."""
        place, own = dims
        if not 0 <= own < out.dim() or out.shape[own] % self.examples:
            return False
        return x is None or (0 <= place < x.dim() and x.shape[place] == out.shape[own])

    def leave(self, names: list[str], why: str) -> None:
        """Leave parameters to single examples, from this batch on."""
        for name in names:
            self.unruled.setdefault(name, why)

    def start(self, out: Tensor) -> Tensor:
        """Return an output as part of the graph, of which it may be the start."""
        if out.requires_grad or not torch.is_grad_enabled():
            return out
        return out + self.anchor(out.device)  # not a leaf, which in-place code would trip over

    def anchor(self, device: torch.device) -> Tensor:
        """Return the zero that graphs start from: differentiating to it visits every use, and no parameter."""
        if device not in self.anchors:
            self.anchors[device] = torch.zeros((), device=device, requires_grad=True)
        return self.anchors[device]

    def cast(self, x: Tensor) -> Tensor:
        """Return a product's input as autocast will have it, so that it is cast once and kept in that form."""
        kind = x.device.type
        if x.is_floating_point() and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            return x.to(torch.get_autocast_dtype(kind))
        return x

    # ---- the backward pass ------------------------------------------------------------------------------------------

    def receive(self, output: Output, grad: Tensor) -> None:
        """Take D of one output. A parameter is done when all its uses are; most have one."""
        if self.stage is _FORWARD:
            if torch.is_grad_enabled():  # a gradient that is part of the loss depends on its weights a second time
                self.leave(list(output.uses), "differentiated inside the loss")
            return
        if self.stage is _CODED:
            output.sketches.append(owners.sketch(grad, output.dim))
            return
        uses = {name: use for name, use in output.uses.items() if name in self.uses}
        for use in uses.values():
            use.grad = grad
        if uses and not self.in_order:
            self.judge(output, list(uses), grad)
        done = [name for name in uses if len(self.uses[name]) == 1]
        if len(done) == 2:
            first, second = (self.target(name) for name in done)
            if uses[done[0]].accumulate_with_bias_(first, second):
                for name, target in zip(done, (first, second), strict=True):
                    self.rules[name] = uses[name].rule
                    self.uses.pop(name)[0].__dict__.clear()
                    self.commit(name, target)
                return
        for name in done:
            self.finish(name)

    def judge(self, output: Output, names: list[str], grad: Tensor) -> None:
        """Compare D with what the coded passes made of it; the verdict stays on the device."""
        owner, right = self.code.read(owners.sketch(grad, output.dim), output.sketches, grad.dtype)
        for name in names:
            own, same = owners.merged(owner, self.owners[name]) if name in self.owners else (owner, right)
            before = self.verdicts.get(name, right)
            self.owners[name] = own
            self.verdicts[name] = before & right & same & owners.distinct(own)

    def backward(self, losses: Tensor) -> None:
        """Differentiate the losses and accumulate every parameter's squares into ``totals``.

        Parameters whose rows are not known to be their examples' add nothing; they are unruled afterwards.
        """
        with torch.autocast(losses.device.type, enabled=False):  # what the rules compute is not the model's
            if losses.requires_grad:
                self.differentiate(losses)
            self.stage = _PLAIN
            with torch.no_grad():
                for name in list(self.uses):
                    self.finish(name)
        if self.verdicts:
            names, verdicts = zip(*self.verdicts.items(), strict=True)
            device = verdicts[0].device
            right = torch.stack([verdict.to(device) for verdict in verdicts]).tolist()
            self.leave(
                [n for n, ok in zip(names, right, strict=True) if not ok], "rows that are not one example's each"
            )

    def differentiate(self, losses: Tensor) -> None:
        graph = owners.inspect(losses, self.examples)
        unseen = [self.names[id(leaf)] for leaf in graph.leaves if id(leaf) in self.names]
        self.leave([name for name in unseen if name in self.wanted], "used where its calls are not seen")
        for name in self.unruled:
            self.uses.pop(name, None)
        first = all(use.out_dim == 0 for uses in self.uses.values() for use in uses)
        self.in_order = self.examples == 1 or (graph.in_order and first)
        if not self.uses:
            return
        if not self.in_order:
            self.stage = _CODED
            self.code = owners.Code(self.examples, torch.float16 in self.dtypes | {losses.dtype})
            for weights in self.code.weights(losses):
                torch.autograd.grad(losses, graph.leaves, weights, retain_graph=True, allow_unused=True)
        self.stage = _PLAIN
        torch.autograd.grad(losses.sum(), graph.leaves, allow_unused=True)

    def target(self, name: str) -> Tensor:
        """Return what a parameter's squares are added to: its total, or zeros until the verdict is known."""
        return self.totals[name] if self.in_order else torch.zeros_like(self.totals[name])

    def commit(self, name: str, target: Tensor) -> None:
        """Add what was put aside to the total, if the rows are their examples'."""
        if not self.in_order:
            self.totals[name].add_(torch.where(self.verdicts[name], target, 0.0))

    def finish(self, name: str) -> None:
        """Accumulate a parameter's uses and let go of what they held."""
        uses = [use for use in self.uses.pop(name) if use.grad is not None]  # without D: not on the way to a loss
        self.rules[name] = " + ".join(dict.fromkeys(use.rule for use in uses)) or "no gradient"
        if not uses:
            return
        target = self.target(name)
        if len(uses) == 1:
            uses[0].accumulate_(target)
        else:
            rules.accumulate_uses_(target, uses)
        self.commit(name, target)
        for use in uses:
            use.__dict__.clear()


def find_layout(one: Tape, two: Tape, unruled: dict[str, str]) -> Layout:
    """Compare the shapes that one and two examples give; what fits no pattern becomes unruled."""
    layout: Layout = {}
    for key in one.shapes.keys() | two.shapes.keys():
        name = key[0]
        if key not in one.shapes or key not in two.shapes:
            unruled.setdefault(name, "used a different number of times by one and by two examples")
            continue
        dims = tuple(rules.doubled_dimension(a, b) for a, b in zip(one.shapes[key], two.shapes[key], strict=True))
        shared = dims == _SHARED and two.shapes[key][0][:1] == (1,)
        if None in dims or (dims[1] == -1 and not shared):
            unruled.setdefault(name, "an output without an example dimension")
            continue
        layout[key] = dims
    return layout


def _flat(values: Any):
    for value in values:
        if type(value) in (list, tuple) or type(value) is type({}.values()):
            yield from _flat(value)
        else:
            yield value


def _detached(value: Any, names: dict[int, str]):
    if type(value) in (list, tuple):
        return type(value)([_detached(v, names) for v in value])
    if type(value) is dict:
        return {k: _detached(v, names) for k, v in value.items()}
    return value.detach() if id(value) in names else value
