"""Whose row of a gradient is it? Two ways to know: the autograd graph proves it, or a second backward pass shows it.

The losses are [B], loss j of example j. Call a tensor *in order* if B equal runs of its elements, row after row, belong
to examples 0 .. B-1. The losses are in order. Where every node between them and the uses of parameters carries order
from its output to its inputs whatever the data (`inspect` knows the nodes that do), all their gradients are in order,
for the shapes at hand. Whatever selects by data (indices, sorting, routing), moves the first dimension, or is not known
proves nothing; nor does a matrix product of two activations, whose zeros may route.

Such a pass is run twice, on one graph, so dropout draws once. D is linear in the losses' weights; with weights that are
different powers of two, the rows of example j are scaled by its own power, exactly, and a row of several examples
shows itself. This is looked at in every such batch: equal shapes do not mean equal owners. Squares are summed over
examples, so B runs of rows may be theirs in any order, the same for all uses of a parameter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .precision import rounding

Shape = tuple[int, ...]
_DIRECTIONS = 8  # random directions that a row is projected on: what of it is another example's shows in one of them
_WIDEST = 1 << 16  # elements that are projected at once


class Graph(NamedTuple):
    """What lies behind some losses.

    Attributes:
        leaves: the tensors that gradients can be taken of.
        in_order: whether the gradients of all nodes are proven to be in order.
    """

    leaves: list[Tensor]
    in_order: bool


def inspect(losses: Tensor, examples: int) -> Graph:
    """Walk the autograd graph of losses [B] of B examples."""
    leaves: list[Tensor] = []
    in_order = True
    for node in _nodes(losses):
        if (name := node.name()) == _LEAF:
            leaves.append(node.variable)
        elif in_order and examples > 1:
            in_order = _carries_order(node, name, examples)
    return Graph(leaves, in_order)


def leaves_of(losses: Tensor) -> list[Tensor]:
    """Return the tensors that gradients can be taken of."""
    return [node.variable for node in _nodes(losses) if node.name() == _LEAF]


def _nodes(losses: Tensor) -> Iterator[Any]:
    """Give each node of the graph once."""
    stack, seen = [losses.grad_fn], {losses.grad_fn}
    while stack:
        node = stack.pop()
        yield node
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)


_LEAF = "torch::autograd::AccumulateGrad"


def _carries_order(node: Any, name: str, examples: int) -> bool:
    rule = _RULES.get(name.rstrip("0123456789"))
    if rule is None or not name[-1].isdigit():  # a function of the user's own has no number
        return False
    inputs = [child._input_metadata[i].shape for child, i in node.next_functions if child and child.name() != _LEAF]
    outputs = [data.shape for data in node._input_metadata]
    return all(rule(node, tuple(outputs[0]), tuple(shape), examples) for shape in inputs)


def _same_elements(node: Node, output: Shape, shape: Shape, examples: int) -> bool:
    """Views: the same elements in the same order."""
    return True


def _elementwise(node: Node, output: Shape, shape: Shape, examples: int) -> bool:
    """An input that is broadcast over examples belongs to all of them."""
    return shape == output or (len(shape) == len(output) and _batched(node, output, shape, examples))


def _batched(node: Node, output: Shape, shape: Shape, examples: int) -> bool:
    """What acts on each index of the first dimension alone."""
    return bool(shape and output) and shape[0] == output[0] and shape[0] % examples == 0


def _of_input(node: Node, output: Shape, shape: Shape, examples: int) -> bool:
    """The same, with weights that are constants."""
    only_input = [i for i, (child, _) in enumerate(node.next_functions) if child] == [0]
    return only_input and _batched(node, output, shape, examples)


def _along(node: Node, output: Shape, shape: Shape, examples: int) -> bool:
    """What moves or sums along dimensions that it names, the first not among them."""
    if shape == output and type(node).__name__.startswith("Slice"):
        return True  # of everything
    dims = next((getattr(node, name) for name in _DIMENSIONS if hasattr(node, name)), None)
    dims = (dims,) if isinstance(dims, int) else dims
    length = max(len(shape), len(output))
    named = bool(dims) and 0 not in [_signed(dim) % length for dim in dims]  # none named: all elements
    return named and _batched(node, output, shape, examples)


_DIMENSIONS = ("_saved_dim", "_saved_dims", "_saved_dimension")


def _permuted(node: Node, output: Shape, shape: Shape, examples: int) -> bool:
    """The first dimension that is longer than 1 stays the first."""
    order = list(range(len(shape)))
    if hasattr(node, "_saved_dims"):
        order = [_signed(d) % len(shape) for d in node._saved_dims]
    else:
        a, b = (_signed(d) % len(shape) for d in (node._saved_dim0, node._saved_dim1))
        order[a], order[b] = b, a
    order = [d for d in order if shape[d] != 1]
    return order == sorted(order) or (order[0] == min(order) and shape[order[0]] % examples == 0)


def _repeated(node: Node, output: Shape, shape: Shape, examples: int) -> bool:
    repeats = node._saved_repeats
    return len(repeats) == len(shape) and repeats[0] == 1 and shape[0] % examples == 0


def _times_constant(which: int) -> Callable[..., bool]:
    def rule(node: Node, output: Shape, shape: Shape, examples: int) -> bool:
        """input @ constant (+ constant): row for row."""
        alone = [i for i, (child, _) in enumerate(node.next_functions) if child] == [which]
        rows = 1
        for size in shape[:-1]:
            rows *= size
        return alone and len(shape) >= 2 and shape[:-1] == output[:-1] and rows % examples == 0

    return rule


def _products(node: Node, output: Shape, shape: Shape, examples: int) -> bool:
    """Products of matrices with matrices, [n, ., .] and [n, ., .], or attention's [n, ...]."""
    return _times_constant(0)(node, output, shape, examples) or (
        len(shape) == len(output) and _batched(node, output, shape, examples)
    )


def _padded(node: Node, output: Shape, shape: Shape, examples: int) -> bool:
    return len(node._saved_pad) < 2 * len(shape) and _batched(node, output, shape, examples)


def _normalised(node: Node, output: Shape, shape: Shape, examples: int) -> bool:
    return len(node._saved_normalized_shape) < len(shape) and _of_input(node, output, shape, examples)


def _batch_norm(node: Node, output: Shape, shape: Shape, examples: int) -> bool:
    return not node._saved_training and _of_input(node, output, shape, examples)


def _signed(dim: int) -> int:
    return dim - (1 << 64) if dim >= 1 << 63 else dim  # as nodes keep negative dimensions


_KINDS: dict[Callable[..., bool], str] = {
    _same_elements: "View UnsafeView ReshapeAlias Alias Unsqueeze Squeeze Clone ToCopy",
    _elementwise: "Add Sub Rsub Mul Div Neg Abs Pow Sqrt Rsqrt Exp Log Log1P Expm1 Reciprocal Sin Cos Tanh Sigmoid "
    "Relu Gelu Silu Mish Elu LeakyRelu Hardtanh Hardswish Hardsigmoid Softplus LogSigmoid Erf Clamp ClampMin ClampMax "
    "Minimum Maximum Where MaskedFill Addcmul Addcdiv Lerp Expand NativeDropout FusedDropout MseLoss SmoothL1Loss "
    "HuberLoss BinaryCrossEntropy BinaryCrossEntropyWithLogits",
    _along: "Softmax LogSoftmax SafeSoftmax Sum Mean Amax Amin Max Min Logsumexp Cumsum Slice Select Split "
    "SplitWithSizes Unbind Cat Stack Gather IndexSelect Flip Roll Unfold LinalgVectorNorm Std Var Prod Glu",
    _permuted: "Transpose Permute",
    _padded: "ConstantPadNd",
    _repeated: "Repeat",
    _times_constant(0): "Mm",
    _times_constant(1): "Addmm",
    _products: "Bmm Baddbmm ScaledDotProductFlashAttentionForCpu ScaledDotProductFlashAttention "
    "ScaledDotProductEfficientAttention ScaledDotProductCudnnAttention",
    _normalised: "NativeLayerNorm FusedRmsNorm",
    _batch_norm: "NativeBatchNorm CudnnBatchNorm",
    _of_input: "Convolution MaxPool2DWithIndices AvgPool2D AdaptiveAvgPool2D UpsampleNearest2D UpsampleBilinear2D "
    "UpsampleBicubic2D NativeGroupNorm NllLoss NllLoss2D",
}
_RULES = {f"{kind}Backward": rule for rule, kinds in _KINDS.items() for kind in kinds.split()}


# ---- the second pass ------------------------------------------------------------------------------------------------


class Code:
    """Weights of B losses that tell whose a row is: powers of two, in as many passes as tell all examples apart.

    Args:
        examples: B.
        half: whether float16, which has few exponents, is among what the gradients pass through.
    """

    def __init__(self, examples: int, half: bool):
        self.examples = examples
        self.lowest = -4 if half else -16
        self.powers = [2.0**exponent for exponent in range(self.lowest, -self.lowest)]

    def weights(self, losses: Tensor) -> list[Tensor]:
        """Return weights [B], one tensor a pass: the digits of each example's number."""
        powers = torch.tensor(self.powers)
        digits, passes = torch.arange(self.examples), []
        while not passes or bool(digits.any()):
            passes.append(powers[digits % len(powers)].to(losses))
            digits = digits // len(powers)
        return passes

    def read(self, plain: Tensor, coded: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return whose each of B equal runs of rows is, [B], -1 for zeros; and whether each is of one example at all.

        On a CPU the same sums are taken in the same order in all passes, so that powers of two scale them exactly. On
        another device atomic additions come in any order; there a row may differ by as much as rounding makes.

        Args:
            plain: the `sketch` of D.
            coded: those of the passes with `weights` on the losses.
            dtype: of D.
        """
        runs = plain.reshape(self.examples, -1, _DIRECTIONS)
        allowed = torch.full_like(runs[..., :1], 2.0**16 * torch.finfo(runs.dtype).smallest_normal)  # squares are 0
        if plain.device.type != "cpu":
            allowed = allowed + 16 * rounding([dtype], plain.device) * runs.norm(dim=-1, keepdim=True)
        powers = torch.tensor(self.powers, dtype=runs.dtype, device=runs.device)
        size = runs.double().square().sum((1, 2))
        owner = torch.zeros(self.examples, dtype=torch.long, device=plain.device)
        right = torch.ones((), dtype=torch.bool, device=plain.device)
        for place, sketches in enumerate(coded):
            sketches = sketches.reshape(runs.shape)
            ratio = (sketches.double() * runs).sum((1, 2)) / size
            digit = (ratio.log2().round().nan_to_num() - self.lowest).clamp(0, len(powers) - 1).long()
            power = powers[digit][:, None, None]
            right = right & ((sketches - runs * power).abs() <= allowed * power.clamp(min=1)).all()
            owner += digit * len(powers) ** place
        return torch.where(size == 0, -1, owner), right


def merged(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return whose runs are, as two uses of a parameter show it, and whether they show the same."""
    return torch.maximum(one, other), ((one == other) | (one < 0) | (other < 0)).all()


def distinct(owner: Tensor) -> Tensor:
    """Return, as a boolean tensor, whether no two runs of rows belong to one example."""
    ordered = owner.sort().values
    return ~((ordered[1:] == ordered[:-1]) & (ordered[1:] >= 0)).any()


def sketch(grad: Tensor, dim: int) -> Tensor:
    """Return random projections [L, M, 8] of the rows of a gradient whose dimension ``dim`` has length L."""
    grad = grad.detach().movedim(dim, 0)
    rows = grad.reshape(len(grad), 1, -1)
    if rows.shape[-1] > _WIDEST:
        rows = rows.view(len(grad), -1, grad.shape[-1])
    rows = rows if rows.dtype == torch.float64 else rows.float()
    return rows @ _directions(rows.shape[-1], rows.dtype, rows.device)


@functools.lru_cache(maxsize=64)
def _directions(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    draw = torch.Generator().manual_seed(width)
    return torch.randn(width, _DIRECTIONS, generator=draw, dtype=torch.float64).to(device, dtype)
