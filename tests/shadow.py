"""What an optimizer must hold after a step: Algorithm 1 in fp64, and how far fp32 arithmetic may be from it.

Shares no code with the package: masks come from bool tensors, keep-bits from a Philox of its own. A bound is the number
of fp32 roundings on the way to a value, each of them at most U of it, counted line by line in `check_step`.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from oracles import Oracle
from torch import Tensor

U = 2.0**-24 * 1.01  # of one rounding to fp32, products of several bounds included
TINY = 2.0**-149  # what one rounding of a subnormal fp32 may cost


@dataclass
class Held:
    """A parameter and its state, all shaped like it, zero outside the child, on the CPU.

    ``companion`` is the fp32 master or the compensation of a 16-bit weight; None: it has none, or none yet.
    """

    w: Tensor
    m: Tensor
    v: Tensor
    t: int = 0
    companion: Tensor | None = None

    @classmethod
    def of(cls, param: Tensor, entry: dict, child: Tensor, moment_dtype: torch.dtype) -> Held:
        """Read one parameter and its entry, packed or not."""
        w = param.detach().cpu().resolve_neg().clone(memory_format=torch.contiguous_format)

        def dense(key: str, otherwise: Tensor) -> Tensor:
            value = entry[key].detach().cpu() if key in entry else otherwise
            if value.shape == w.shape:
                return value.clone(memory_format=torch.contiguous_format)
            full = otherwise.to(value.dtype).clone()
            full[child] = value  # in row-major order
            return full

        none = torch.zeros(w.shape, dtype=moment_dtype)
        keys = [key for key in ("master", "compensation") if key in entry and w.dtype != torch.float32]
        companion = dense(keys[0], w.float() if keys[0] == "master" else torch.zeros_like(w)) if keys else None
        return cls(w, dense("exp_avg", none), dense("exp_avg_sq", none), int(entry.get("step", 0)), companion)

    def standing(self) -> Tensor:
        """Return the fp32 weights that the weights and their companion stand for; replaced weights count."""
        if self.companion is None:
            return self.w.float()
        exact = self.companion if self.companion.dtype == torch.float32 else self.w.float() + self.companion.float()
        return torch.where(exact.to(self.w.dtype) == self.w, exact, self.w.float())

    def of_child(self, old: Tensor, new: Tensor, companions: bool) -> Held:
        """Return what is left when the child changes."""
        stays = old & new
        m, v = (torch.where(stays, x, torch.zeros_like(x)) for x in (self.m, self.v))
        if self.companion is None or not companions:
            return replace(self, m=m, v=v, companion=None)
        outside = self.w.float() if self.companion.dtype == torch.float32 else torch.zeros_like(self.w)
        return replace(self, m=m, v=v, companion=torch.where(stays, self.companion, outside))


def philox(counters: np.ndarray, step: int, key: int) -> np.ndarray:
    """Return philox4x32-10 of (low, high, step, 0) for 64-bit counters: uint64 [n, 4], from Salmon et al. (SC 2011)."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    zeros = np.zeros_like(counters)
    a, b, c, d = counters & low, counters >> half, zeros + np.uint64(step), zeros
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        x, y = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (y >> half) ^ b ^ np.uint64(k0), y & low, (x >> half) ^ d ^ np.uint64(k1), x & low
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return np.stack([a, b, c, d], axis=1)


def keep_bits(name: str, seed: int, step: int, p: float, shape: torch.Size) -> Tensor:
    """Return which gradient elements F keeps, as design and README promise it."""
    n = math.prod(shape)
    key = seed ^ int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    words = philox(np.arange((n + 3) // 4, dtype=np.uint64), step, key).reshape(-1)[:n]
    return torch.from_numpy(words < np.uint64(math.floor(p * 2**32))).view(shape)


def check_step(
    what: str,
    before: Held,
    after: Held,
    grad: Tensor,
    hyper: dict,
    *,
    keep: Tensor,
    child: Tensor,
    factor: float = 1.0,
    factor_roundings: int = 0,
    decay: str = "child",
    dialect: str = "torch",
    stochastic: bool = False,
) -> None:
    """Demand that one step took ``before`` to ``after``.

    Args:
        factor: of the gradient: clipping and unscaling.
        factor_roundings: how many roundings are in it.
    """
    assert after.t == before.t + 1, f"{what}: {before.t} steps, then {after.t}"
    beta1, beta2 = hyper["betas"]
    sign = -factor if hyper["maximize"] else factor
    g = torch.where(keep & child, grad.double() * sign, 0.0)
    oracle = Oracle(before.standing())
    oracle.m, oracle.v, oracle.t = before.m.double(), before.v.double(), before.t
    own = {key: hyper[key] for key in ("betas", "eps", "weight_decay")} | {"lr": float(hyper["lr"])}
    oracle.step(g, keep=keep.double(), p=hyper["reserve_p"], child=child.double(), decay=decay, dialect=dialect, **own)

    in_g = 4 + factor_roundings  # the factor, its product, 1 / p, its product
    terms = beta1 * before.m.double().abs() + (1 - beta1) / hyper["reserve_p"] * g.abs()
    slack_m = (3 + in_g) * U * terms + TINY  # each product two, the sum one
    slack_v = (4 + 2 * in_g) * U * oracle.v + TINY  # g * g, its product two, the sum one: no cancellation
    c1, c2 = 1 - beta1**oracle.t, 1 - beta2**oracle.t
    root = (oracle.v / c2).sqrt() if dialect == "torch" else oracle.v.sqrt()
    slope = own["lr"] / c1 * (1 if dialect == "torch" else math.sqrt(c2)) / (root + own["eps"])
    move = slope * oracle.m
    in_move = 10 + in_g  # half of v's, sqrt, the correction twice, eps twice, the quotient, the step size twice
    start = before.standing().double().abs()
    slack_w = 5 * U * start + (in_move + 4) * U * move.abs() + slope * slack_m + TINY  # decay three, two sums
    changes = child | (decay == "all")
    slack_w = torch.where(changes, slack_w, 0.0)

    _within(f"{what}: exp_avg", after.m, oracle.m, torch.where(child, slack_m, 0.0))
    _within(f"{what}: exp_avg_sq", after.v, oracle.v, torch.where(child, slack_v, 0.0))
    dtype = after.w.dtype
    lost = torch.finfo(dtype).eps * oracle.w.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    _within(f"{what}: weight", after.w, oracle.w, slack_w + torch.where(changes, lost, 0.0) * stochastic)
    if after.companion is None or not child.any():
        return
    if after.companion.dtype == torch.float32:
        _within(f"{what}: master", after.companion[child], oracle.w[child], slack_w[child])
        return
    left = oracle.w - after.w.double()  # a compensation has the 8 or 11 bits of its dtype, and is cut by 1/256 at ties
    finite = child & left.isfinite()
    slack = slack_w + 2.0**-7 * (left.abs() + slack_w) + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    _within(f"{what}: compensation", after.companion[finite], left[finite], slack[finite])


def _within(what: str, got: Tensor, value: Tensor, slack: Tensor) -> None:
    """Demand a value between the roundings of the bounds: rounding is monotonous, so this holds in any dtype."""
    exact = value.to(got.dtype)
    low, high = ((value + s * slack).to(got.dtype) for s in (-1, 1))
    right = torch.where(value.isfinite(), (low <= got) & (got <= high), (got == exact) | (got.isnan() & exact.isnan()))
    if not right.all():
        wrong = (~right).nonzero()
        at = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{what}: {len(wrong)} of {got.numel()} out of bounds, first at {at}: {got[at].item()!r} instead of "
            f"{value[at].item()!r} within {slack[at].item():.3e}"
        )
