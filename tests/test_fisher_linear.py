"""The sums of squared per-example gradients: accuracy against float64, shapes, strides, sums that are added to."""

from __future__ import annotations

import pytest
import torch

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-6, torch.float16: 1e-6}  # 16-bit products are exact in float32


def relative(got, want):
    return float((got.double().cpu() - want).norm() / want.norm())


def product(d, x):
    return sum((d_j.T @ x_j) ** 2 for d_j, x_j in zip(d.double().cpu(), x.double().cpu(), strict=True))


SHAPES = [(3, 5, 7, 9), (2, 1, 4, 6), (1, 70, 65, 33), (5, 64, 64, 128), (2, 129, 130, 1), (2, 128, 128, 256)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(shape, dtype, place):
    b, t, o, i = shape
    draw = torch.Generator().manual_seed(sum(shape))
    d = torch.randn(b, t, o, generator=draw).to(place.device, dtype)
    x = torch.randn(b, t, i, generator=draw).to(place.device, dtype)
    before = torch.rand(o, i, generator=draw).to(place.device)
    total = before.clone()
    place.kernels.fisher_linear_(total, d, x)
    assert relative(total, before.double().cpu() + product(d, x)) < BOUNDS[dtype]


def test_linear_squares_after_the_sum_over_positions(place):
    """Two positions that cancel: the rule of a token at a time would give 2."""
    d = torch.tensor([[[1.0], [-1.0]]], device=place.device)
    total = torch.zeros(1, 1, device=place.device)
    place.kernels.fisher_linear_(total, d, torch.ones_like(d))
    assert float(total) == 0.0


def test_linear_with_strides(place):
    """Sequence first, and rows inside a wider buffer whose rest must not be read."""
    d = torch.randn(6, 3, 8, device=place.device).transpose(0, 1)
    wide = torch.full((3, 6, 20), float("nan"), device=place.device)
    wide[:, :, 4:12] = torch.randn(3, 6, 8, device=place.device)
    x = wide[:, :, 4:12]
    total = torch.zeros(8, 8, device=place.device)
    place.kernels.fisher_linear_(total, d, x)
    assert relative(total, product(d, x)) < BOUNDS[torch.float32]


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 1, 40), (2, 300, 17), (1, 128, 16)], ids=str)
def test_columns(shape, dtype, place):
    draw = torch.Generator().manual_seed(sum(shape))
    d = torch.randn(shape, generator=draw).to(place.device, dtype)
    factor = torch.randn(shape, generator=draw).to(place.device)
    scaled, plain = torch.rand(2, shape[2], device=place.device).unbind()
    want = [s.double().cpu() for s in (scaled, plain)]
    place.kernels.fisher_columns_(scaled, d, factor, plain)
    want[0] = want[0] + (d.double().cpu() * factor.double().cpu()).sum(1).square().sum(0)
    want[1] = want[1] + d.double().cpu().sum(1).square().sum(0)
    assert relative(scaled, want[0]) < 1e-5 and relative(plain, want[1]) < 1e-5
    alone = torch.zeros(shape[2], device=place.device)
    place.kernels.fisher_columns_(alone, d)
    assert relative(alone, d.double().cpu().sum(1).square().sum(0)) < 1e-5


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5)], ids=str)
def test_nothing_to_add(shape, place):
    b, t, o, i = shape
    total, column = torch.ones(o, i, device=place.device), torch.ones(o, device=place.device)
    d = torch.ones(b, t, o, device=place.device)
    place.kernels.fisher_linear_(total, d, torch.ones(b, t, i, device=place.device))
    place.kernels.fisher_columns_(column, d)
    assert bool((total == 1).all()) and bool((column == 1).all())


REFUSED = [
    ("d", torch.zeros(2, 3), r"shapes \[B, T, O\] and \[B, T, ...\], got \(2, 3\)"),
    ("x", torch.zeros(2, 4, 5), r"got \(2, 3, 4\) and \(2, 4, 5\)"),
    ("x", torch.zeros(2, 3, 5).half(), "x must have d's dtype torch.float32, got torch.float16"),
    ("d", torch.zeros(2, 3, 4).int(), "d must be of a floating dtype, got torch.int32"),
    ("x", torch.zeros(2, 5, 3).mT, r"contiguous in its last dimension, got strides \(15, 1, 3\)"),
    ("total", torch.zeros(5, 4), r"total must be .* of shape \(4, 5\) .* got torch.float32 of shape \(5, 4\)"),
    ("total", torch.zeros(4, 5).double(), "total must be a contiguous torch.float32 .* got torch.float64"),
]


@pytest.mark.parametrize("name, value, message", REFUSED)
def test_refusals(name, value, message):
    given = {"total": torch.zeros(4, 5), "d": torch.zeros(2, 3, 4), "x": torch.zeros(2, 3, 5)} | {name: value}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.childtune.fisher_linear_(*given.values())
