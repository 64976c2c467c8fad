"""Which calls use parameters, and by which rule: one handler a function of torch.

A handler gets the tape, the function and its arguments, and returns the function's result; NotImplemented where the
parameter stands in another place than the rule is for.
"""

from __future__ import annotations

import functools
import inspect
import string
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .rules import Bias, Convolution, Einsum, Elementwise, Lookup, Norm, Product, Scale

if TYPE_CHECKING:
    from .tape import Tape

Dims = tuple[int, int]  # which dimension of the input, and of the output, the examples are in


def _linear(tape: Tape, func: Callable, input: Tensor, weight: Tensor, bias: Tensor | None = None):
    if tape.name(input) or not tape.name(weight) or weight.dim() != 2 or (bias is not None and not tape.name(bias)):
        return NotImplemented

    def make(x: Tensor, dims: Dims):
        uses = [Product(weight.shape, tape.examples, dims[1], x=x, x_dim=dims[0])]
        return uses + ([Bias(bias.shape, tape.examples, dims[1])] if bias is not None else [])

    x = tape.cast(input)
    return tape.call(func, (x, weight, bias), {}, (weight, bias), x, make)


def _addmm(
    tape: Tape, func: Callable, bias: Tensor, input: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1
):
    """HF's Conv1D: bias + input @ weight, weight [I, O]."""
    plain = beta == 1 and alpha == 1 and not tape.name(input)
    if not (plain and tape.name(weight) and tape.name(bias)) or bias.dim() != 1:
        return NotImplemented

    def make(x: Tensor, dims: Dims):
        return [
            Product(weight.shape, tape.examples, dims[1], x=x, x_dim=dims[0], transposed=True),
            Bias(bias.shape, tape.examples, dims[1]),
        ]

    x = tape.cast(input)
    if tape.layout is not None and tape.layout.get((tape.name(weight), tape.counts[tape.name(weight)])) == (-1, -1):
        return NotImplemented  # the input is not where `call` would expand it
    return tape.call(_reordered_addmm, (x, weight, bias), {}, (weight, bias), x, make)


def _reordered_addmm(x: Tensor, weight: Tensor, bias: Tensor):
    return torch.addmm(bias, x, weight)


def _matmul(tape: Tape, func: Callable, input: Tensor, other: Tensor):
    if tape.name(input) or not tape.name(other) or other.dim() != 2:
        return NotImplemented

    def make(x: Tensor, dims: Dims):
        return [Product(other.shape, tape.examples, dims[1], x=x, x_dim=dims[0], transposed=True)]

    x = tape.cast(input)
    return tape.call(func, (x, other), {}, (other,), x, make)


def _einsum(tape: Tape, func: Callable, equation: str, *operands: Any):
    """Two operands, the second a parameter; equations without ellipsis, each index once an operand."""
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or tape.name(operands[0]) or "..." in equation:
        return NotImplemented
    terms, _, result = equation.replace(" ", "").partition("->")
    left, right = terms.split(",")
    repeated = any(len(set(term)) != len(term) for term in (left, right, result))
    if repeated or not result or not set(right) <= set(left) | set(result):
        return NotImplemented
    weight = operands[1]

    def make(x: Tensor, dims: Dims):
        return [_einsum_use(tape, weight, x, dims, left, right, result)]

    x = tape.cast(operands[0])
    return tape.call(_swapped_einsum, (x, equation, weight), {}, (weight,), x, make)


def _swapped_einsum(x: Tensor, equation: str, weight: Tensor):
    return torch.einsum(equation, x, weight)


def _einsum_use(tape: Tape, weight: Tensor, x: Tensor, dims: Dims, left: str, right: str, result: str):
    """Return a `Product` where the weight's indices are the input's, then the output's or the reverse.

    None where input and output do not go over examples in the same index.
    """
    if left[dims[0]] != result[dims[1]] or left[dims[0]] in right:
        return None
    inner = "".join(i for i in right if i in left and i not in result)
    outer = "".join(i for i in right if i in result and i not in left)
    shared = left[: len(left) - len(inner)]
    if right in (outer + inner, inner + outer) and inner and outer and left == shared + inner:
        if result == shared + outer:
            return Product(
                weight.shape, tape.examples, dims[1], x=x, x_dim=dims[0],
                inner=len(inner), outer=len(outer), transposed=right == inner + outer,
            )  # fmt: skip
    example = next(letter for letter in string.ascii_letters if letter not in left + right + result)
    equation = f"{example}{left},{example}{result}->{example}{right}"
    return Einsum(weight.shape, tape.examples, dims[1], x=x, x_dim=dims[0], equation=equation)


def _embedding(
    tape: Tape,
    func: Callable,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
):
    if max_norm is not None or scale_grad_by_freq or not tape.name(weight):
        return NotImplemented
    row = None if padding_idx is None else padding_idx % weight.shape[0]  # -1: the last row, unlike torch.embedding

    def make(ids: Tensor, dims: Dims):
        return [Lookup(weight.shape, tape.examples, dims[1], ids=ids, ids_dim=dims[0], padding_idx=row)]

    return tape.call(func, (input, weight, padding_idx), {}, (weight,), input, make)


def _layer_norm(
    tape: Tape,
    func: Callable,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
):
    normalise = functools.partial(F.layer_norm, normalized_shape=normalized_shape, eps=eps)
    return _norm(tape, func, input, normalized_shape, weight, bias, normalise, (eps,))


def _rms_norm(
    tape: Tape,
    func: Callable,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
):
    normalise = functools.partial(F.rms_norm, normalized_shape=normalized_shape, eps=eps)
    return _norm(tape, func, input, normalized_shape, weight, None, normalise, (eps,))


def _norm(
    tape: Tape,
    func: Callable,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor,
    bias: Tensor,
    normalise: Callable,
    rest,
):
    if tape.name(input) or any(p is not None and not tape.name(p) for p in (weight, bias)):
        return NotImplemented

    def make(x: Tensor, dims: Dims):
        weights = [Norm(weight.shape, tape.examples, dims[1], x=x, normalise=normalise)] if weight is not None else []
        return weights + ([Elementwise(bias.shape, tape.examples, dims[1])] if bias is not None else [])

    affine = (weight, bias) if func is F.layer_norm else (weight,)
    return tape.call(func, (input, normalized_shape, *affine, *rest), {}, (weight, bias), input, make)


def _conv2d(
    tape: Tape,
    func: Callable,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
):
    if groups != 1 or isinstance(padding, str) or input.dim() != 4 or tape.name(input) or not tape.name(weight):
        return NotImplemented
    unfold = tuple(dict(stride=stride, padding=padding, dilation=dilation).items())

    def make(x: Tensor, dims: Dims):
        uses = [Convolution(weight.shape, tape.examples, dims[1], x=x, unfold=unfold)]
        return uses + ([Bias(bias.shape, tape.examples, dims[1], axis=-3)] if bias is not None else [])

    x = tape.cast(input)
    return tape.call(func, (x, weight, bias, stride, padding, dilation, 1), {}, (weight, bias), x, make)


def _broadcast(tape: Tape, func: Callable, a: Tensor, b: Tensor, **options: Any):
    """Addition and multiplication of a parameter and something else."""
    if options or (tape.name(a) and tape.name(b)):
        return NotImplemented
    param, other = (a, b) if tape.name(a) else (b, a)

    def make(_, dims: Dims):
        if func in _SUMS:
            return [Elementwise(param.shape, tape.examples, dims[1])]
        return [Scale(param.shape, tape.examples, dims[1], other=torch.as_tensor(other))]

    return tape.call(func, (a, b), {}, (param,), None, make)


def _expand(tape: Tape, func: Callable, param: Tensor, *sizes: Any):
    def make(_, dims: Dims):
        return [Elementwise(param.shape, tape.examples, dims[1])]

    return tape.call(func, (param, *sizes), {}, (param,), None, make)


_SUMS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
_PRODUCTS = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)

_HANDLERS = {
    F.linear: _linear,
    torch.addmm: _addmm,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), _matmul),
    torch.einsum: _einsum,
    torch.functional.einsum: _einsum,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    **dict.fromkeys((F.conv2d, torch.conv2d), _conv2d),
    **dict.fromkeys(_SUMS + _PRODUCTS, _broadcast),
    Tensor.expand: _expand,
}


def handler_of(func: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable | None:
    """Return the handler of a call; None where no rule is for the function, or for this form of calling it."""
    if (handler := _HANDLERS.get(func)) is None:
        return None
    try:
        _signature(handler).bind(None, func, *args, **kwargs)
    except TypeError:  # as torch.mm(x, mat2=w): arguments by names, or of overloads, that the handler does not know
        return None
    return handler


_signature = functools.cache(inspect.signature)
