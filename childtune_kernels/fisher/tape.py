"""What a model does with its parameters: while it runs, their class is one that hears of every call that takes them.

Other calls cost nothing more (a torch function mode would hear of all: 7 us each). Parameters are constants to autograd
meanwhile, so no weight gradient is computed and `.grad` stays as it is.
Calls that use one (F.linear, einsum, a raw parameter added or multiplied ...) have a handler that records the use; a
call without one makes its parameters `unruled`, to be treated one example at a time by `estimate`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor, nn

from . import rules
from .handlers import HANDLERS
from .rules import Elementwise, Use

TOGETHER = 32 << 20  # bytes of gradients that wait for one launch

# (name, which use of it) -> the dimensions of (input, output) that go over examples; -1: none does
Layout = dict[tuple[str, int], tuple[int, int]]


class _Watched(nn.Parameter):
    """What a parameter is inside a `Tape`."""

    tape: Tape | None = None

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return cls.tape.hear(func, args, kwargs or {})


class Tape:
    """Records uses in its context; with ``totals``, squares and sums each when the backward pass has reached it.

    Args:
        params: name -> parameter, of all parameters of the model; of a class of its own one is `unruled`.
        wanted: the names to estimate; others are constants and no more.
        examples: B, the number of examples in the batch.
        layout: from `find_layout`; None records shapes only.
        totals: name -> accumulator.
        unruled: names that are left alone; a use without a handler adds its name, with the reason.
    """

    def __init__(
        self,
        params: dict[str, Tensor],
        wanted: Collection[str],
        examples: int,
        unruled: dict[str, str],
        layout: Layout | None = None,
        totals: dict[str, Tensor] | None = None,
    ):
        self.plain = [p for p in params.values() if type(p) is nn.Parameter]
        self.names = {id(p): name for name, p in params.items()}
        self.wanted = wanted
        self.examples = examples
        self.unruled = unruled
        self.layout = layout
        self.totals = totals
        self.shapes: dict[tuple[str, int], tuple[torch.Size, torch.Size]] = {}
        self.anchors: dict[torch.device, Tensor] = {}
        self.uses: dict[str, list[Use]] = defaultdict(list)
        self.counts: dict[str, int] = defaultdict(int)
        self.waiting: dict[str, Elementwise] = {}
        self.waiting_bytes = 0
        self.rules: dict[str, str] = {}
        for name, param in params.items():
            if type(param) is not nn.Parameter and name in wanted:
                unruled.setdefault(name, f"a parameter of class {type(param).__name__}")

    def __enter__(self) -> Tape:
        _Watched.tape = self
        for param in self.plain:
            param.__class__ = _Watched
        return self

    def __exit__(self, *exception) -> None:
        for param in self.plain:
            param.__class__ = nn.Parameter
        _Watched.tape = None

    def hear(self, func, args: tuple, kwargs: dict):
        """Answer a call that takes parameters, whose class does not count here."""
        used = _watched((*args, *kwargs.values()))
        handler = HANDLERS.get(func)
        if handler is not None and any(map(self.active, used)):
            result = handler(self, func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*map(_constant, args), **_constant(kwargs))
        if isinstance(result, (Tensor, tuple, list)) and not isinstance(result, torch.Size):
            for param in filter(self.active, used):
                self.unruled.setdefault(self.names[id(param)], f"no rule for {getattr(func, '__name__', func)}")
        return result

    # ---- for handlers -----------------------------------------------------------------------------------------------

    def name(self, value) -> str | None:
        """Return the name of a watched parameter, None for anything else."""
        return self.names.get(id(value))

    def active(self, param: Tensor) -> bool:
        """Return whether uses of a parameter are recorded."""
        name = self.names[id(param)]
        return name in self.wanted and name not in self.unruled

    def call(self, func, args: tuple, params: tuple, x: Tensor | None, make: Callable[..., list[Use]]):
        """Run ``func`` on constants and record the uses of ``params`` that ``make(x, dims)`` describes.

        Args:
            args: of func, with parameters and with the input at position 0 where x is not None.
            params: the parameters used, in the order of ``make``'s result; None stands for an absent one.
            make: given the input as used and (input, output) dimensions over examples; one `Use` a parameter.
        """
        active = [self.names[id(p)] if self.active(p) else None for p in params if p is not None]
        keys = [(name, self.counts[name]) for name in active if name]
        for name, _ in keys:
            self.counts[name] += 1
        dims = None
        if self.layout is not None:
            if any(key not in self.layout for key in keys):
                raise RuntimeError(
                    f"the model uses {keys[0][0]!r} more often in this batch than in the first: exclude it, "
                    "or make the model's path independent of the data"
                )
            dims = self.layout[keys[0]]
            if x is not None and dims == (-1, -1):  # shared by the batch, like position ids: one copy an example
                x = x.expand(self.examples, *x.shape[1:])
                args = (x, *args[1:])
                dims = (0, 0)
        out = func(*map(_constant, args))
        if self.layout is None:
            for key in keys:
                self.shapes[key] = (torch.Size() if x is None else x.shape, out.shape)
            return out
        uses = {name: use for name, use in zip(active, make(x, dims), strict=True) if name}
        for name, use in uses.items():
            self.uses[name].append(use)
        if not torch.is_grad_enabled():
            return out
        if not out.requires_grad:  # the start of the graph; not a leaf, which in-place code would trip over
            out = out + self.anchor(out.device)
        out.register_hook(partial(self.receive, uses))
        return out

    def anchor(self, device: torch.device) -> Tensor:
        """Return the zero that graphs start from: differentiating to it visits every use, and no parameter."""
        if device not in self.anchors:
            self.anchors[device] = torch.zeros((), device=device, requires_grad=True)
        return self.anchors[device]

    def cast(self, x: Tensor) -> Tensor:
        """Return a product's input as autocast will have it, so that it is cast once and kept in that form."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64:
            return x.to(torch.get_autocast_dtype(kind))
        return x

    # ---- the backward pass ------------------------------------------------------------------------------------------

    def receive(self, uses: dict[str, Use], grad: Tensor) -> None:
        """Take D of one output. A parameter is done when all its uses are; most have one."""
        for name, use in uses.items():
            use.grad = grad
            if len(self.uses[name]) > 1:
                continue
            if isinstance(use, Elementwise):
                self.waiting[name] = use
                self.waiting_bytes += grad.nbytes
            else:
                self.finish(name)
        if self.waiting_bytes >= TOGETHER:
            self.finish_waiting()

    def backward(self, losses: Tensor) -> None:
        """Differentiate the sum of the losses and accumulate every parameter's squares into ``totals``."""
        with torch.autocast(losses.device.type, enabled=False):  # what the rules compute is not the model's
            if losses.requires_grad:
                torch.autograd.grad(losses.sum(), list(self.anchors.values()), allow_unused=True)
            with torch.no_grad():
                self.finish_waiting()
                for name in list(self.uses):
                    self.finish(name)

    def finish_waiting(self) -> None:
        """Accumulate the shifts and scales that wait, in one launch: one each takes longer than the rest of a hook."""
        waiting, self.waiting, self.waiting_bytes = self.waiting, {}, 0
        rules.accumulate_columns_([self.totals[name] for name in waiting], list(waiting.values()))
        for name, use in waiting.items():
            self.rules[name] = use.rule
            self.uses.pop(name)
            use.__dict__.clear()

    def finish(self, name: str) -> None:
        """Accumulate a parameter's uses and let go of what they held."""
        uses = [use for use in self.uses.pop(name) if use.grad is not None]  # without D: not on the way to a loss
        self.rules[name] = " + ".join(dict.fromkeys(use.rule for use in uses)) or "no gradient"
        if not uses:
            return
        if len(uses) == 1:
            uses[0].accumulate_(self.totals[name])
        else:
            rules.accumulate_uses_(self.totals[name], uses)
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
        shared = dims == (-1, -1) and two.shapes[key][0][:1] == (1,)
        if None in dims or (dims[1] == -1 and not shared):
            unruled.setdefault(name, "an output without an example dimension")
            continue
        layout[key] = dims
    return layout


def _watched(values) -> list[Tensor]:
    """Return the parameters among a call's arguments, at any depth."""
    found = []
    for value in values:
        if type(value) is _Watched:
            found.append(value)
        elif type(value) in (list, tuple):
            found += _watched(value)
    return found


def _constant(value):
    """Return an argument with parameters, at any depth, replaced by what autograd takes for constants."""
    kind = type(value)
    if kind is _Watched:
        return value.detach()
    if kind is list or kind is tuple:
        return kind([_constant(v) for v in value])
    if kind is dict:
        return {k: _constant(v) for k, v in value.items()}
    return value
