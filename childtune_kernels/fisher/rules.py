"""Per-example gradients of one parameter, use by use: what `tape` records and how Eq. 10 squares and sums it.

For a loss that is a sum over examples, D = dL/d(output) holds every example's gradient in its own rows (`owners` says
how that is known), and so the gradient G_j of example j follows from D and the use's input alone. A parameter used once
takes its rule's short way, which never holds more than a few G_j; one used several times sums the uses' G_j before it
squares.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops

_CHUNK_BYTES = 64 << 20  # of per-example gradients held at a time, where a rule has to hold them


@dataclass
class Use:
    """One use of a parameter in the forward pass.

    Attributes:
        shape: of the parameter.
        examples: B.
        out_dim: the dimension of the output that goes over examples, or examples times positions, examples first.
        grad: D, once the backward pass has come here.
    """

    shape: torch.Size
    examples: int
    out_dim: int
    grad: Tensor | None = None
    rule: ClassVar[str] = ""

    def per_example(self, lo: int, hi: int) -> Tensor:
        """Return G_lo .. G_hi-1, at least fp32, [hi - lo, *shape]."""
        raise NotImplementedError

    def accumulate_(self, total: Tensor) -> None:
        """Add sum_j G_j**2 (one batch of Eq. 10) to ``total``."""
        accumulate_uses_(total, [self])

    def accumulate_with_bias_(self, total: Tensor, bias_total: Tensor) -> bool:
        """Do so for the output's bias too, where one launch serves both; return whether it did."""
        return False


def accumulate_uses_(total: Tensor, uses: list[Use]) -> None:
    """Add sum_j (sum over uses of G_j)**2: the square comes after the sum, a few examples at a time."""
    if all(isinstance(use, Product) for use in uses) and len({use.transposed for use in uses}) == 1:
        d, x = (torch.cat(parts, dim=1) for parts in zip(*(use.operands() for use in uses), strict=True))
        return _product_(total, d, x, uses[0].transposed)
    examples = uses[0].examples
    chunk = max(1, _CHUNK_BYTES // max(1, 4 * total.numel()))
    for lo in range(0, examples, chunk):
        hi = min(lo + chunk, examples)
        gradient = uses[0].per_example(lo, hi)
        for use in uses[1:]:
            gradient = gradient + use.per_example(lo, hi)
        total.add_(gradient.to(total.dtype).square_().sum(0))
    return None


def by_example(tensor: Tensor, dim: int, examples: int) -> Tensor:
    """Return [B, ..., r, ...] where ``dim`` has length B * r, examples first; the other dimensions keep their order."""
    return tensor.unflatten(dim, (examples, -1)).movedim(dim, 0)


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in fp32, or fp64 where it is that."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def dense(tensor: Tensor) -> Tensor:
    """Return the tensor with a contiguous last dimension."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _product_(total: Tensor, d: Tensor, x: Tensor, transposed: bool) -> None:
    rows, columns = (x, d) if transposed else (d, x)
    total = total.view(rows.shape[2], columns.shape[2])
    ops.implementation("auto", total.device.type).fisher_linear_(total, dense(rows), dense(columns))


@dataclass
class Product(Use):
    """output = input @ weight: G_j = sum_t D[j, t]^T x[j, t], weight [O, I], or [I, O] if ``transposed``."""

    x: Tensor | None = None
    x_dim: int = 0
    inner: int = 1  # how many trailing dimensions of x are summed over, and of D index the output
    outer: int = 1
    transposed: bool = False
    rule: ClassVar[str] = "product"

    def operands(self) -> tuple[Tensor, Tensor]:
        """Return D [B, T, O] and x [B, T, I]."""
        d = by_example(self.grad, self.out_dim, self.examples).flatten(-self.outer)
        x = by_example(self.x, self.x_dim, self.examples).flatten(-self.inner)
        x = x.to(d.dtype)
        return d.flatten(1, -2), x.flatten(1, -2)

    def per_example(self, lo: int, hi: int):
        d, x = (wide(part[lo:hi]) for part in self.operands())
        rows, columns = (x, d) if self.transposed else (d, x)
        return torch.bmm(rows.mT, columns).view(hi - lo, *self.shape)

    def accumulate_(self, total: Tensor):
        _product_(total, *self.operands(), self.transposed)


@dataclass
class Convolution(Product):
    """conv2d without groups: a product of unfolded patches."""

    unfold: tuple = ()
    rule: ClassVar[str] = "convolution"

    def operands(self):
        x = F.unfold(self.x, self.shape[2:], **dict(self.unfold)).mT
        d, x = (by_example(part, 0, self.examples).flatten(1, 2) for part in (self.grad.flatten(2).mT, x))
        return d, x.to(d.dtype)


@dataclass
class Einsum(Use):
    """Any other two-operand einsum: G_j by the einsum that keeps the example's index."""

    x: Tensor | None = None
    equation: str = ""  # of x and D, both by example, to [example, *shape]
    x_dim: int = 0
    rule: ClassVar[str] = "einsum"

    def per_example(self, lo: int, hi: int):
        x = by_example(self.x, self.x_dim, self.examples)[lo:hi]
        d = by_example(self.grad, self.out_dim, self.examples)[lo:hi]
        return torch.einsum(self.equation, wide(x), wide(d))


@dataclass
class Elementwise(Use):
    """output = parameter (+ or *) something, broadcast: G_j sums D, or D * factor, over the broadcast dimensions."""

    rule: ClassVar[str] = "shift"

    def factor(self) -> Tensor | None:
        """Return d output / d parameter, broadcastable to the output; None for 1."""
        return None

    def columns(self) -> tuple[Tensor, Tensor | None] | None:
        """Return D and factor as [B, T, *shape flattened], or None where the parameter is not the trailing part."""
        shape = self.shape
        while shape and shape[0] == 1:
            shape = shape[1:]
        d = by_example(self.grad, self.out_dim, self.examples)
        split = d.dim() - len(shape)
        if split < 1 or d.shape[split:] != shape:
            return None
        target = (self.examples, -1, shape.numel())
        factor = self.factor()
        if factor is not None:
            factor = by_example(torch.broadcast_to(factor, self.grad.shape), self.out_dim, self.examples)
            factor = dense(factor.reshape(target))
        return dense(d.reshape(target)), factor

    def per_example(self, lo: int, hi: int):
        d = wide(by_example(self.grad, self.out_dim, self.examples)[lo:hi])
        if (factor := self.factor()) is not None:
            factor = torch.broadcast_to(factor, self.grad.shape)
            d = d * by_example(factor, self.out_dim, self.examples)[lo:hi]
        aligned = (1,) * (self.grad.dim() - len(self.shape)) + tuple(self.shape)
        summed = [i + 1 for i, size in enumerate(aligned) if size == 1]
        return (d.sum(summed, keepdim=True) if summed else d).reshape(hi - lo, *self.shape)

    def accumulate_(self, total: Tensor, plain_total: Tensor | None = None):
        columns = self.columns()
        if columns is None:
            accumulate_uses_(total, [self])
        else:
            plain = None if plain_total is None else plain_total.view(-1)
            ops.implementation("auto", total.device.type).fisher_columns_(total.view(-1), *columns, plain)


@dataclass
class Bias(Elementwise):
    """The bias of a product or convolution: D summed over all but its channels."""

    axis: int = -1
    rule: ClassVar[str] = "bias"

    def columns(self):
        d = by_example(self.grad, self.out_dim, self.examples).movedim(self.axis, -1)
        return dense(d.flatten(1, -2)), None

    def per_example(self, lo: int, hi: int):
        return wide(self.columns()[0][lo:hi]).sum(1)


@dataclass
class Scale(Elementwise):
    """output = parameter * other."""

    other: Tensor | None = None
    rule: ClassVar[str] = "scale"

    def factor(self):
        return self.other


@dataclass
class Norm(Elementwise):
    """The weight of a layer norm or RMS norm: D times the normalised input, never (output - bias) / weight."""

    x: Tensor | None = None
    normalise: Callable[[Tensor], Tensor] | None = None
    rule: ClassVar[str] = "norm"

    def factor(self):
        return self.normalise(wide(self.x))

    def accumulate_with_bias_(self, total: Tensor, bias_total: Tensor):
        self.accumulate_(total, bias_total)
        return True


@dataclass
class Lookup(Use):
    """An embedding: rows of D summed by id within the example, then squared."""

    ids: Tensor | None = None
    ids_dim: int = 0
    padding_idx: int | None = None
    rule: ClassVar[str] = "embedding"

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return ids [B, T] and D [B, T, width]; rows of the padding id get no gradient."""
        ids = by_example(self.ids, self.ids_dim, self.examples).flatten(1).contiguous()
        d = wide(by_example(self.grad, self.out_dim, self.examples).flatten(1, -2))
        if self.padding_idx is not None:
            d = d.masked_fill((ids == self.padding_idx)[..., None], 0.0)
        return ids, d

    def per_example(self, lo: int, hi: int):
        ids, d = self.rows()
        gradient = d.new_zeros(hi - lo, *self.shape)
        for j in range(lo, hi):
            gradient[j - lo].index_add_(0, ids[j], d[j])
        return gradient

    def accumulate_(self, total: Tensor):
        """Sum D over equal ids of an example by sorting them: no [B, vocabulary, width], no wait for the device."""
        ids, d = self.rows()
        examples, positions, width = d.shape
        ids, order = ids.sort(dim=1)
        first = torch.ones_like(ids, dtype=torch.bool)
        first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        slots = first.cumsum(1) - 1 + positions * torch.arange(examples, device=ids.device)[:, None]
        d = d.gather(1, order[..., None].expand_as(d)).view(-1, width)
        sums = torch.zeros_like(d).index_add_(0, slots.view(-1), d)
        owner = torch.zeros_like(ids).view(-1).scatter_(0, slots.view(-1), ids.view(-1))  # spare slots add 0 to row 0
        total.index_add_(0, owner, sums.square_().to(total.dtype))


def doubled_dimension(one: torch.Size, two: torch.Size) -> int | None:
    """Return the only dimension that two examples make twice as long, -1 if none changed, None if neither holds."""
    if len(one) != len(two):
        return None
    changed = [i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]
    if not changed:
        return -1
    return changed[0] if len(changed) == 1 and two[changed[0]] == 2 * one[changed[0]] else None
