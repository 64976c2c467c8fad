"""Which calls use parameters, and by which rule: one handler a function of torch.

A handler gets the tape, the function and its arguments, and returns the function's result; NotImplemented where the
parameter stands in another place than the rule is for.
"""

from __future__ import annotations

import functools
import string

import torch
import torch.nn.functional as F
from torch import Tensor

from .rules import Bias, Convolution, Einsum, Elementwise, Lookup, Norm, Product, Scale


def _linear(tape, func, input, weight, bias=None):
    if tape.name(input) or not tape.name(weight) or weight.dim() != 2 or (bias is not None and not tape.name(bias)):
        return NotImplemented

    def make(x, dims):
        uses = [Product(weight.shape, tape.examples, dims[1], x=x, x_dim=dims[0])]
        return uses + ([Bias(bias.shape, tape.examples, dims[1])] if bias is not None else [])

    x = tape.cast(input)
    return tape.call(func, (x, weight, bias), {}, (weight, bias), x, make)


def _addmm(tape, func, bias, input, weight, *, beta=1, alpha=1):
    """HF's Conv1D: bias + input @ weight, weight [I, O]."""
    plain = beta == 1 and alpha == 1 and not tape.name(input)
    if not (plain and tape.name(weight) and tape.name(bias)) or bias.dim() != 1:
        return NotImplemented

    def make(x, dims):
        return [
            Product(weight.shape, tape.examples, dims[1], x=x, x_dim=dims[0], transposed=True),
            Bias(bias.shape, tape.examples, dims[1]),
        ]

    x = tape.cast(input)
    if tape.layout is not None and tape.layout.get((tape.name(weight), tape.counts[tape.name(weight)])) == (-1, -1):
        return NotImplemented  # the input is not where `call` would expand it
    return tape.call(_reordered_addmm, (x, weight, bias), {}, (weight, bias), x, make)


def _reordered_addmm(x, weight, bias):
    return torch.addmm(bias, x, weight)


def _matmul(tape, func, input, other):
    if tape.name(input) or not tape.name(other) or other.dim() != 2:
        return NotImplemented

    def make(x, dims):
        return [Product(other.shape, tape.examples, dims[1], x=x, x_dim=dims[0], transposed=True)]

    x = tape.cast(input)
    return tape.call(func, (x, other), {}, (other,), x, make)


def _einsum(tape, func, equation, *operands):
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

    def make(x, dims):
        return [_einsum_use(tape, weight, x, dims, left, right, result)]

    x = tape.cast(operands[0])
    return tape.call(_swapped_einsum, (x, equation, weight), {}, (weight,), x, make)


def _swapped_einsum(x, equation, weight):
    return torch.einsum(equation, x, weight)


def _einsum_use(tape, weight, x, dims, left, right, result):
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
    tape, func, input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False
):
    if max_norm is not None or scale_grad_by_freq or not tape.name(weight):
        return NotImplemented
    row = None if padding_idx is None else padding_idx % weight.shape[0]  # -1: the last row, unlike torch.embedding

    def make(ids, dims):
        return [Lookup(weight.shape, tape.examples, dims[1], ids=ids, ids_dim=dims[0], padding_idx=row)]

    return tape.call(func, (input, weight, padding_idx), {}, (weight,), input, make)


def _layer_norm(tape, func, input, normalized_shape, weight=None, bias=None, eps=1e-5):
    normalise = functools.partial(F.layer_norm, normalized_shape=normalized_shape, eps=eps)
    return _norm(tape, func, input, normalized_shape, weight, bias, normalise, (eps,))


def _rms_norm(tape, func, input, normalized_shape, weight=None, eps=None):
    normalise = functools.partial(F.rms_norm, normalized_shape=normalized_shape, eps=eps)
    return _norm(tape, func, input, normalized_shape, weight, None, normalise, (eps,))


def _norm(tape, func, input, normalized_shape, weight, bias, normalise, rest):
    if tape.name(input) or any(p is not None and not tape.name(p) for p in (weight, bias)):
        return NotImplemented

    def make(x, dims):
        weights = [Norm(weight.shape, tape.examples, dims[1], x=x, normalise=normalise)] if weight is not None else []
        return weights + ([Elementwise(bias.shape, tape.examples, dims[1])] if bias is not None else [])

    affine = (weight, bias) if func is F.layer_norm else (weight,)
    return tape.call(func, (input, normalized_shape, *affine, *rest), {}, (weight, bias), input, make)


def _conv2d(tape, func, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    if groups != 1 or isinstance(padding, str) or input.dim() != 4 or tape.name(input) or not tape.name(weight):
        return NotImplemented
    unfold = tuple(dict(stride=stride, padding=padding, dilation=dilation).items())

    def make(x, dims):
        uses = [Convolution(weight.shape, tape.examples, dims[1], x=x, unfold=unfold)]
        return uses + ([Bias(bias.shape, tape.examples, dims[1], axis=-3)] if bias is not None else [])

    x = tape.cast(input)
    return tape.call(func, (x, weight, bias, stride, padding, dilation, 1), {}, (weight, bias), x, make)


def _broadcast(tape, func, a, b, **options):
    """Addition and multiplication of a parameter and something else."""
    if options or (tape.name(a) and tape.name(b)):
        return NotImplemented
    param, other = (a, b) if tape.name(a) else (b, a)

    def make(_, dims):
        if func in _SUMS:
            return [Elementwise(param.shape, tape.examples, dims[1])]
        return [Scale(param.shape, tape.examples, dims[1], other=torch.as_tensor(other))]

    return tape.call(func, (a, b), {}, (param,), None, make)


def _expand(tape, func, param, *sizes):
    def make(_, dims):
        return [Elementwise(param.shape, tape.examples, dims[1])]

    return tape.call(func, (param, *sizes), {}, (param,), None, make)


_SUMS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
_PRODUCTS = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)

HANDLERS = {
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
