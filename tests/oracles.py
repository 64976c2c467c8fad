"""What the tests hold the package to. Written from the paper and from IEEE arithmetic; shares no code with it."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

INT_OF = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Oracle:
    """Algorithm 1 for one parameter, as naively as the paper writes it.

    With ``dtype=torch.float64`` it is the truth; with float32 and 16-bit storage it is what eager code of the same
    dtypes makes of it, and so says how large an error is unavoidable.
    """

    def __init__(self, weight: Tensor, *, dtype=torch.float64, weight_dtype=None, moment_dtype=None):
        self.dtype = dtype
        self.weight_dtype, self.moment_dtype = weight_dtype or dtype, moment_dtype or dtype
        self.w = weight.detach().to(dtype).clone()
        self.m, self.v = torch.zeros_like(self.w), torch.zeros_like(self.w)
        self.t = 0

    def step(
        self,
        grad: Tensor,
        *,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=1e-2,
        dialect="torch",
        keep: Tensor | None = None,
        p: float = 1.0,
        child: Tensor | None = None,
        decay: str = "child",
    ) -> None:
        """Take one step: ``keep`` and ``p`` for F, ``child`` and ``decay`` for D."""
        self.t += 1
        beta1, beta2 = betas
        g = grad.to(self.dtype)
        decays = torch.ones_like(self.w)
        if keep is not None:
            g = g * keep / p  # Eq. 4
        if child is not None:
            g = g * child  # Eq. 1-3
            decays = decays if decay == "all" else child.to(self.dtype)
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g * g
        correction1, correction2 = 1 - beta1**self.t, 1 - beta2**self.t
        if dialect == "torch":
            self.w = self.w - lr * weight_decay * decays * self.w
            self.w = self.w - lr * (self.m / correction1) / ((self.v / correction2).sqrt() + eps)
        else:
            self.w = self.w - lr * math.sqrt(correction2) / correction1 * self.m / (self.v.sqrt() + eps)
            self.w = self.w - lr * weight_decay * decays * self.w
        self.w = self.w.to(self.weight_dtype).to(self.dtype)
        self.m, self.v = (x.to(self.moment_dtype).to(self.dtype) for x in (self.m, self.v))


class Judge:
    """A truth in fp64 and the eager computation of the same dtypes, stepped together."""

    def __init__(self, weight: Tensor, moment_dtype: torch.dtype = torch.float32):
        weight = weight.detach().cpu()
        self.truth = Oracle(weight)
        self.eager = Oracle(weight, dtype=torch.float32, weight_dtype=weight.dtype, moment_dtype=moment_dtype)

    def step(self, grad: Tensor, **kwargs) -> None:
        for oracle in (self.truth, self.eager):
            oracle.step(grad.detach().cpu(), **kwargs)

    def check(self, w: Tensor, m: Tensor, v: Tensor) -> None:
        for name, got in (("w", w), ("m", m), ("v", v)):
            assert_as_accurate(got, getattr(self.truth, name), getattr(self.eager, name), name)


def assert_as_accurate(got: Tensor, truth: Tensor, eager: Tensor, what: str = "value", ulps: int = 4) -> None:
    """Demand an error against fp64 of at most the eager computation's, plus ``ulps`` units in the last place.

    The unit is that of the largest value; the allowance covers a different order of the same few roundings.
    """
    got, truth, eager = (x.detach().cpu() for x in (got, truth, eager))
    assert got.shape == truth.shape == eager.shape
    if not got.numel():
        return
    error = (got.double() - truth.double()).abs().max().item()
    unavoidable = (eager.double() - truth.double()).abs().max().item()
    allowance = ulps * torch.finfo(got.dtype).eps * truth.abs().max().item()
    assert error <= unavoidable + allowance, f"{what}: error {error:.3e}, eager {unavoidable:.3e} + {allowance:.3e}"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bitwise equality, signed zeros included; any NaN equals any NaN, since hardware differs in its payload."""
    a, b = (x.detach().cpu().resolve_neg().contiguous() for x in (a, b))
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    bits = INT_OF[a.element_size()]
    return bool(((a.view(bits) == b.view(bits)) | (a.isnan() & b.isnan())).all())


def written_order_step(
    w, g, m, v, t: int, row, *, lr=None, scale=None, norm=None, keep=None, child=None, decay_outside=0, raw=False
):
    """One update in the written order of fp32 operations that the package promises, in numpy.

    numpy rounds each operation by itself and to nearest, so this is the promise, not a second opinion on it.

    Args:
        w, g, m, v: CPU tensors, any float dtype, unchanged.
        t: the step being taken, from 1.
        row: the parameter's row of the hyper table.
        keep, child: bool, F's and D's mask.
        decay_outside: whether weights outside the child decay.
        raw: leave the new weights in fp32.

    Returns:
        The new (w, m, v), in the dtypes that came.
    """
    f, d = np.float32, np.float64
    lr0, beta1, beta2, eps, weight_decay, p, sign, hf, max_norm, _ = (d(x) for x in row)
    lr = lr0 if lr is None else d(f(lr))
    scale = d(1) if scale is None else d(f(scale))
    W, G, M, V = (x.detach().float().numpy() for x in (w, g, m, v))
    with np.errstate(all="ignore"):
        clip = d(1) if norm is None else max_norm / (d(f(norm)) / scale + d(1e-6))
        clip = d(1) if clip >= 1 else clip
        correction1, root2 = 1 - _power(beta1, t), np.sqrt(1 - _power(beta2, t))
        step_size = lr / correction1 * (root2 if hf else d(1))
        inverse_root2 = d(1) if hf else 1 / root2
        shrink = f(0.0 - lr * weight_decay)
        before, after = (f(0), shrink) if hf else (shrink, f(0))
        decayed = W + before * W
        decayed = decayed + after * decayed
        G = G * f(sign * clip / scale)
        if keep is not None:
            G = np.where(keep.numpy(), G * f(1 / p), f(0))
        new_m = f(beta1) * M + f(1 - beta1) * G
        new_v = f(beta2) * V + f(1 - beta2) * (G * G)
        new_w = W + before * W
        new_w = new_w - f(step_size) * (new_m / (np.sqrt(new_v) * f(inverse_root2) + f(eps)))
        new_w = new_w + after * new_w
    if child is not None:
        inside = child.numpy()
        outside = (decayed if decay_outside else W, M, V)
        new_w, new_m, new_v = (np.where(inside, a, b) for a, b in zip((new_w, new_m, new_v), outside, strict=True))
    dtypes = (torch.float32 if raw else w.dtype, m.dtype, v.dtype)
    return tuple(torch.from_numpy(np.asarray(a)).to(t) for a, t in zip((new_w, new_m, new_v), dtypes, strict=True))


def neighbours(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The 16-bit values around finite fp32 values, towards zero and away from it; the same where they are exact."""
    nearest = x.to(dtype)
    bits = nearest.view(torch.int16)
    below = torch.where(nearest.float().abs() > x.abs(), bits - 1, bits)  # sign and magnitude: one bit is one step
    above = torch.where(below.view(dtype).float() == x, below, below + 1)
    return below.view(dtype), above.view(dtype)


def stochastic(x: Tensor, words: Tensor, dtype: torch.dtype) -> Tensor:
    """Stochastic rounding as the package promises it, by neighbours and distances in fp64.

    The threshold has as many bits as a normal number loses: 16 for bfloat16, 13 for float16.
    """
    below, above = neighbours(x, dtype)
    cut = 16 if dtype == torch.bfloat16 else 13
    lo, hi, exact = (y.double().abs() for y in (below, above, x))
    if dtype == torch.float16:  # subnormal: first rounded to fp32 beside the smallest normal number
        small = exact < 2.0**-14
        exact = torch.where(small, (x.abs() + 2.0**-14).double() - 2.0**-14, exact)
    share = torch.where(hi > lo, (exact - lo) / (hi - lo).clamp(min=1e-300), 0.0)
    up = (share * 2**cut).floor() + (words >> (32 - cut)).double() >= 2**cut
    return torch.where(x.isfinite(), torch.where(up, above, below), x.to(dtype))


def _power(base, exponent: int):
    power = np.float64(1)
    while exponent:
        power, base, exponent = power * base if exponent & 1 else power, base * base, exponent >> 1
    return power


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """philox4x32-10 in Python integers, from the algorithm's description (Salmon et al., SC 2011, sec. 4.3)."""
    (c0, c1, c2, c3), (k0, k1), low = counter, key, 2**32
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b // low) ^ c1 ^ k0, b % low, (a // low) ^ c3 ^ k1, a % low
        k0, k1 = (k0 + 0x9E3779B9) % low, (k1 + 0xBB67AE85) % low
    return c0, c1, c2, c3
