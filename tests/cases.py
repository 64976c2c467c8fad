"""Inputs for op and optimizer tests: lists of awkward tensors in guarded buffers, and small models."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from oracles import same_bits, stochastic, written_order_step
from torch import Tensor

from childtune_kernels import ChildAdamW, ChildMask, ops, philox
from childtune_kernels.ops.tensors import TensorList
from childtune_kernels.ops.update import DECAY_OUTSIDE, RESERVE_P

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = 1024  # the largest unit of work of any kernel
SHAPES = ((0,), (1,), (31,), (32,), (33,), (BLOCK - 1,), (BLOCK,), (BLOCK + 1,), (37, 29), (), (3, 0, 2))
if os.environ.get("TRITON_INTERPRET") == "1":  # interpreting takes 15 to 50 ms a program: a step of all shapes, seconds
    SHAPES = ((0,), (33,), (BLOCK + 1,), ())
SENTINEL, MARGIN = 7.0, 19


@dataclass
class Guards:
    """Tensors that are views into larger buffers, at any element offset, with sentinels on both sides."""

    buffers: list[tuple[Tensor, int, int]] = field(default_factory=list)

    def place(self, values: Tensor, offset: int) -> Tensor:
        n = values.numel()
        buffer = torch.full((offset + n + MARGIN,), SENTINEL, dtype=values.dtype, device=values.device)
        view = buffer[offset : offset + n].view(values.shape)
        view.copy_(values)
        self.buffers.append((buffer, offset, n))
        return view

    def intact(self) -> bool:
        outside = [torch.cat([b[:offset], b[offset + n :]]) for b, offset, n in self.buffers]
        return all(bool((x == SENTINEL).all()) for x in outside)


def hyper_row(i: int = 0, *, dialect="torch", **fixed) -> tuple[float, ...]:
    """A row of the hyper table that differs from parameter to parameter."""
    row = dict(
        lr=1e-2 / (i + 1),
        beta1=(0.9, 0.8, 0.0)[i % 3],
        beta2=(0.999, 0.95)[i % 2],
        eps=(1e-8, 1e-4, 1e-6)[i % 3],
        weight_decay=(0.1, 0.0)[i // 2 % 2],
        reserve_p=1.0,
        sign=1.0,
        hf_dialect=float(dialect == "hf"),
        max_grad_norm=math.inf,
        decay_outside=0.0,
    )
    row.update(fixed)
    return tuple(float(row[column]) for column in ops.HYPER_COLUMNS)


class Kind(NamedTuple):
    """A kind of update: by which lists it has, implementations choose their kernels."""

    keys: bool = False  # F
    words: bool = False  # dense D
    indices: bool = False  # packed D
    packed: bool = False  # gradients lie like the moments of packed D
    p: tuple[float, ...] = (1.0,)  # of the parameters in turn, as the next
    decay_outside: tuple[bool, ...] = (False,)

    def row(self, i: int, **fixed) -> tuple[float, ...]:
        """Parameter i's row of the hyper table."""
        p, outside = (values[i % len(values)] for values in (self.p, self.decay_outside))
        return hyper_row(i, **{"reserve_p": p, "decay_outside": outside, **fixed})


PLAIN = Kind()
BERNOULLI = Kind(keys=True, p=(0.6, 0.3, 0.3))
COMPACT = Kind(indices=True, keys=True, decay_outside=(True,))  # which only dense D reads
KINDS_OF_UPDATE = {
    "plain": PLAIN,
    "bernoulli": BERNOULLI,
    "child": Kind(words=True),
    "child, decay all": Kind(words=True, decay_outside=(True,)),
    "child, decay some": Kind(words=True, decay_outside=(True, False, False)),
    "compact": COMPACT,
    "compact, packed gradient": Kind(indices=True, packed=True),
    "compact, bernoulli": Kind(indices=True, keys=True, p=(0.6, 0.3, 0.3)),
}


class Case:
    """An update on a device, beside a CPU copy that takes the same steps in the written order."""

    def __init__(
        self,
        device,
        kind=PLAIN,
        *,
        shapes=SHAPES,
        dtypes=DTYPES,
        moment_dtype=torch.float32,
        offset=3,
        lr_list=False,
        rounding="nearest",
        shares=(0.0, 0.1, 0.7, 1.0),
        **hyper,
    ):
        generator = torch.Generator().manual_seed(1)
        self.device, self.kind, self.generator, self.guards = device, kind, generator, Guards()
        self.specs = [
            (shape, dtypes[(i + j) % len(dtypes)]) for j in range(len(dtypes)) for i, shape in enumerate(shapes)
        ]
        n = len(self.specs)
        self.offset = offset
        weights = [torch.randn(shape, generator=generator).to(dtype) for shape, dtype in self.specs]
        moments = [torch.zeros(shape, dtype=moment_dtype) for shape, _ in self.specs]
        self.golden = [[w, m, m.clone()] for w, m in zip(weights, moments, strict=True)]
        self.params, self.exp_avgs, self.exp_avg_sqs = (
            [self._place(row[k], i + k) for i, row in enumerate(self.golden)] for k in range(3)
        )
        self.steps = [torch.zeros((), dtype=torch.float64, device=device) for _ in range(n)]
        self.t = 0
        self.rows = [kind.row(i, **hyper) for i in range(n)]
        self.hyper = torch.tensor(self.rows, dtype=torch.float64).view(n, len(ops.HYPER_COLUMNS))
        self.keys = [philox.stream_key(11, f"p{i}") for i in range(n)]
        self.children = [torch.rand(shape, generator=generator) < shares[i % len(shares)]
                         for i, (shape, _) in enumerate(self.specs)]  # fmt: skip
        self.words = [ops.pack_bits(child).to(device) for child in self.children]
        for i in range(4, n, 5):  # no words: the whole tensor is in the child
            self.words[i], self.children[i] = self.words[i][:0], torch.ones_like(self.children[i])
        self.indices: list[Tensor] = []
        self.rounding = rounding
        self.companions: list[Tensor] = []
        self.true = [[w.float(), None] for w in weights]  # fp32 weights and, where there is one, their companion
        self.lrs = [torch.tensor(0.02 / (i + 1), device=device) for i in range(n)] if lr_list else []
        if kind.indices:
            self._pack()
        if rounding in ("master", "compensation"):
            self._accompany()
        self.update = self._update()

    def _place(self, values: Tensor, i: int) -> Tensor:
        return self.guards.place(values.to(self.device), i % self.offset if self.offset else 0)

    def _pack(self) -> None:
        """Replace the moments, zero so far, by the child's: what indices go with."""
        for i, (child, words) in enumerate(zip(self.children, self.words, strict=True)):
            index = child.flatten().nonzero().flatten().int()
            index = index if words.numel() else index[:0]  # no words: the whole tensor, which has no indices either
            self.indices.append(self.guards.place(index.to(self.device), i % self.offset if self.offset else 0))
            for k, moments in ((1, self.exp_avgs), (2, self.exp_avg_sqs)):
                packed = self.golden[i][k] if not words.numel() else self.golden[i][k][child]
                moments[i] = self._place(packed, i + k)

    def _accompany(self) -> None:
        """Make the companions that go with the moments, beside weights that have not changed yet."""
        for i, (weight, _, _) in enumerate(self.golden):
            companion = weight.float() if self.rounding == "master" else torch.zeros_like(weight)
            self.true[i][1] = companion if weight.dtype != torch.float32 else torch.empty(0)
            packed = self.packed(i, companion) if weight.dtype != torch.float32 else self.true[i][1]
            self.companions.append(self._place(packed, i + 2))

    def _update(self) -> ops.Update:
        kind = self.kind
        return ops.Update(
            params=self.params,
            grads=[],  # each step brings its own
            exp_avgs=self.exp_avgs,
            exp_avg_sqs=self.exp_avg_sqs,
            steps=self.steps,
            hyper=self.hyper,
            indices=self.indices if kind.indices else [],
            mask_words=self.words if kind.words else [],
            mask_keys=self.keys if kind.keys else [],
            companions=self.companions,
            rounding_keys=[key ^ 5 for key in self.keys] if self.rounding == "stochastic" else [],
            lrs=self.lrs,
        )

    def packed(self, i: int, values: Tensor) -> Tensor:
        """The child's entries of a parameter-shaped tensor, as packed D holds them."""
        return values[self.children[i].to(values.device)] if self.indices and self.words[i].numel() else values

    def new_grads(self, *, scale: float = 1.0, special: float | None = None) -> list[Tensor]:
        grads = []
        for i, (shape, dtype) in enumerate(self.specs):
            grad = torch.randn(shape, generator=self.generator) * scale
            if special is not None and grad.numel() > 2:
                grad.view(-1)[1] = special
            grads.append(self._place(grad.to(dtype), i + 1))
        return grads

    def step(self, kernels, grads, *, scale=None, found_inf=None, norm=None) -> None:
        """Take a step on the device, with the one update that all steps share, and on the copy, unless skipped."""
        dense = [g.cpu() for g in grads]
        if self.kind.packed:
            grads = [self._place(self.packed(i, g), i + 1) for i, g in enumerate(grads)]
        before = [g.clone() for g in grads]
        scaling = [None if x is None else torch.tensor(float(x), device=self.device) for x in (scale, found_inf, norm)]
        self.update.grads, self.update.scaling = TensorList(grads), ops.Scaling(*scaling)
        kernels.update_(self.update)
        assert all(same_bits(a, b) for a, b in zip(before, grads, strict=True)), "a gradient was written"
        if found_inf:
            return
        self.t += 1
        for i, (golden, row) in enumerate(zip(self.golden, self.rows, strict=True)):
            lr, p = self.lrs[i].item() if self.lrs else None, row[RESERVE_P]
            kwargs = dict(lr=lr, scale=scale, norm=norm)
            if self.kind.keys and p < 1:
                elements = torch.arange(golden[0].numel())
                kwargs.update(keep=philox.keep_bits(elements, self.keys[i], self.t, p).view(golden[0].shape))
            if self.kind.words or self.kind.indices:
                kwargs.update(child=self.children[i], decay_outside=self.kind.words and row[DECAY_OUTSIDE])
            if self.rounding == "nearest" or golden[0].dtype == torch.float32:
                golden[:] = written_order_step(golden[0], dense[i], *golden[1:], self.t, row, **kwargs)
            else:
                self._low_precision_step(i, dense[i], row, kwargs)

    def _low_precision_step(self, i: int, grad: Tensor, row, kwargs) -> None:
        golden, companion = self.golden[i], self.true[i][1]
        weight, dtype = golden[0], golden[0].dtype
        start = weight.float()
        if self.rounding == "master":
            start = companion
        elif self.rounding == "compensation":
            exact = start.double() + companion.double()  # near fp16's smallest numbers it may not round back
            start = torch.where(exact.to(dtype) == weight, exact, start.double()).float()
        new, *golden[1:] = written_order_step(start, grad, *golden[1:], self.t, row, raw=True, **kwargs)
        if self.rounding == "stochastic":
            elements = torch.arange(weight.numel())
            words = philox.words(elements, self.keys[i] ^ 5, self.t, philox.STOCHASTIC_ROUNDING).view(weight.shape)
            rounded = stochastic(new, words, dtype)
            child = kwargs.get("child")
            golden[0] = rounded if child is None else torch.where(child, rounded, weight)
            return
        golden[0] = new.to(dtype)
        lost = (new - golden[0].float()).to(dtype)
        tied = (golden[0].double() + lost.double()).to(dtype) != golden[0]  # half a unit: towards 0 from there
        lost = torch.where(tied, (lost.double() * 255 / 256).to(dtype), lost)
        self.true[i][1] = new if self.rounding == "master" else lost
        if (child := kwargs.get("child")) is not None:
            self.true[i][1] = torch.where(child, self.true[i][1], companion)
            golden[0] = torch.where(child, golden[0], weight)

    def check(self) -> None:
        """Demand bitwise equality of weights and moments, the step count and intact sentinels."""
        for i, golden in enumerate(self.golden):
            got = (self.params[i], self.exp_avgs[i], self.exp_avg_sqs[i])
            expected = (golden[0], *(self.packed(i, moment) for moment in golden[1:]))
            for name, a, b in zip(("param", "exp_avg", "exp_avg_sq"), got, expected, strict=True):
                assert same_bits(a, b), f"{name} {i} {self.specs[i]} at step {self.t}: {_difference(a, b)}"
            if self.companions:
                expected = self.true[i][1]
                expected = self.packed(i, expected) if golden[0].dtype != torch.float32 else expected
                assert same_bits(self.companions[i], expected), f"companion {i} {self.specs[i]} at step {self.t}"
            assert self.steps[i].item() == self.t
        assert self.hyper.tolist() == [list(row) for row in self.rows], "the table was written"
        assert self.guards.intact(), "something outside a tensor was written"


def _difference(a: Tensor, b: Tensor) -> str:
    a, b = a.cpu().double().flatten(), b.double().flatten()
    where = (a != b).nonzero().flatten().tolist()
    return f"{len(where)} of {a.numel()} differ, first at {where[:1]}, largest by {(a - b).abs().max().item():.3e}"


def snapshot(tensors) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def unchanged(before, after) -> bool:
    return all(same_bits(a, b) for a, b in zip(before, after, strict=True))


MODEL = {
    "embed.weight": (7, 5),
    "layer.weight": (33, 31),
    "layer.bias": (33,),
    "norm.scale": (),
    "head.weight": (3, 1031),
}
KINDS = ("plain", "F", "D", "D, dense", "D, decay all", "F in D")


def model(device="cpu", dtype=torch.float32) -> list[tuple[str, torch.nn.Parameter]]:
    """Named parameters of distinct shapes; the same values at every call."""
    generator = torch.Generator().manual_seed(2)
    f32 = torch.float32  # whatever the default dtype is
    weights = {n: torch.randn(s, generator=generator, dtype=f32).to(device, dtype) for n, s in MODEL.items()}
    return [(name, torch.nn.Parameter(weight)) for name, weight in weights.items()]


def set_grads(named, step: int, *, scale: float = 1.0) -> None:
    """Give every parameter a gradient that depends on its position and on ``step`` alone, with no zeros."""
    for i, (_, param) in enumerate(named):
        generator = torch.Generator().manual_seed(1000 * step + i)
        grad = torch.randn(param.shape, generator=generator, dtype=torch.float32) * scale
        param.grad = torch.where(grad == 0, scale, grad).to(param.device, param.dtype)


def child_mask(density: float = 0.3) -> ChildMask:
    """A child network in two of the model's parameters."""
    generator = torch.Generator().manual_seed(3)
    names = ("embed.weight", "head.weight")
    return ChildMask.from_dense({name: torch.rand(MODEL[name], generator=generator) < density for name in names})


def optimizer(named, kind: str = "plain", **kwargs) -> ChildAdamW:
    """ChildAdamW of one kind, with hyper-parameters large enough to matter."""
    of_kind = {
        "plain": {},
        "F": dict(reserve_p=0.3, seed=5),
        "D": dict(mask=child_mask()),
        "D, dense": dict(mask=child_mask(), state="dense"),
        "D, decay all": dict(mask=child_mask(), decay="all"),
        "F in D": dict(mask=child_mask(), reserve_p=0.3, seed=5),
    }
    return ChildAdamW(named, **{"lr": 1e-2, "weight_decay": 0.1, **of_kind[kind], **kwargs})


def train(opt, named, steps, **kwargs) -> None:
    for step in steps:
        set_grads(named, step, **kwargs)
        opt.step()


def weights_of(named) -> list[Tensor]:
    return snapshot(p for _, p in named)


def moments_of(opt) -> list[tuple[Tensor, Tensor]]:
    """The moments, each shaped like its parameter, by parameter."""
    state = opt.dense_state_dict()["state"]
    return [(state[i]["exp_avg"], state[i]["exp_avg_sq"]) for i in sorted(state)]


def state_of(opt) -> list[Tensor]:
    return [opt.state[p][key] for g in opt.param_groups for p in g["params"] for key in sorted(opt.state.get(p, {}))]


def same_training(a, opt_a, b, opt_b) -> bool:
    """Whether two optimizers hold bitwise the same weights and state."""
    states = state_of(opt_a), state_of(opt_b)
    return len(states[0]) == len(states[1]) > 0 and unchanged(weights_of(a), weights_of(b)) and unchanged(*states)
