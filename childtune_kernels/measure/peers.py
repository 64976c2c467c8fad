"""What `childtune bench` compares with: torch's AdamW and the released Child-Tuning algorithm in eager torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli

from .. import ChildAdamW, ChildMask, Fisher

Factory = Callable[[list[Tensor]], torch.optim.Optimizer]

_ROWS, _COLUMNS = 2.0, 0.3  # spreads of clustered_masks
_D_ROWS = {
    "": {},
    ", packed gradient": {"pack_gradients": True, "max_grad_norm": math.inf},
    ", dense state": {"state": "dense"},
}


class EagerChildAdamW(torch.optim.Optimizer):
    """The released algorithm, reproduced from its description: eager kernels, every mask materialised.

    eps is added to sqrt(v) before bias correction, weights decay last, gradients are masked in place.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 2e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        reserve_p: float = 1.0,
        masks: dict[Tensor, Tensor] | None = None,
    ):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, reserve_p=reserve_p))
        self.masks = masks or {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)

    def _update(self, p: Tensor, grad: Tensor, group: dict) -> None:
        state = self.state[p]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        if p in self.masks:
            grad *= self.masks[p]
        elif group["reserve_p"] < 1:
            grad *= Bernoulli(grad.new_full(grad.size(), group["reserve_p"])).sample() / group["reserve_p"]
        state["step"] += 1
        beta1, beta2 = group["betas"]
        state["exp_avg"].mul_(beta1).add_(grad, alpha=1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = state["exp_avg_sq"].sqrt().add_(group["eps"])
        correction = math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        p.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] * correction)
        p.add_(p, alpha=-group["lr"] * group["weight_decay"])


class BernoulliThenFused(torch.optim.AdamW):
    """What F costs with torch's own parts: draw a mask, multiply, fused AdamW."""

    def __init__(self, params: Iterable[Tensor], lr: float = 2e-5, weight_decay: float = 0.01, *, reserve_p: float):
        super().__init__(params, lr=lr, weight_decay=weight_decay, fused=True)
        self.reserve_p = reserve_p

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.mul_(torch.bernoulli(torch.full_like(p.grad, self.reserve_p))).div_(self.reserve_p)
        return super().step(closure)


def random_masks(params: list[Tensor], p: float) -> ChildMask:
    """A random child network of density p, named by position."""
    return ChildMask.from_dense({str(i): torch.rand(t.shape, device=t.device) < p for i, t in enumerate(params)})


def clustered_masks(params: list[Tensor], p: float) -> ChildMask:
    """A child network that clusters in rows, columns and tensors, as those of high Fisher information do.

    The exact Fisher information of a pretrained 6-layer BERT leaves 0.35 of the aligned groups of 16 weights touched
    at p = 0.1 and 0.63 at 0.3; the spreads here were chosen to leave as many of BERT-large's shapes.
    """
    scores = {}
    for i, param in enumerate(params):
        rows = torch.randn(param.shape[:1] + (1,) * (param.dim() - 1), device=param.device)
        columns = torch.randn(param.shape[-1:], device=param.device)
        noise = torch.randn(param.shape, device=param.device) ** 2
        scores[str(i)] = noise * torch.exp(_ROWS * rows + _COLUMNS * columns + torch.randn((), device=param.device))
    return Fisher(scores, 1).top(p)


def touched_groups(mask: ChildMask) -> float:
    """Return the share of aligned groups of 16 weights, 64 bytes in fp32, that hold a weight of the child."""
    groups = [mask.words(name).view(torch.int16) != 0 for name in mask]
    return sum(int(g.sum()) for g in groups) / sum(g.numel() for g in groups)


def compiled_adamw(params: list[Tensor]) -> torch.optim.Optimizer:
    """torch.optim.AdamW with its step compiled, as torch's own tutorial does; a tensor lr avoids recompilation."""
    optimizer = torch.optim.AdamW(params, lr=torch.tensor(2e-5), weight_decay=0.01, capturable=params[0].is_cuda)
    optimizer.step = torch.compile(optimizer.step, fullgraph=False)
    return optimizer


def contenders(impls: list[str], one_group_each: bool = False) -> dict[str, tuple[str, Factory]]:
    """Return name -> (rule, factory); a factory takes the parameters and returns an optimizer."""

    def groups(params: list[Tensor]) -> list[Any]:
        return [{"params": [p]} for p in params] if one_group_each else params

    def ours(impl: str, **options: Any) -> Factory:
        return lambda ps: ChildAdamW(groups(ps), lr=2e-5, weight_decay=0.01, impl=impl, **options)

    rows = {
        "torch AdamW fused": ("none", lambda ps: torch.optim.AdamW(groups(ps), lr=2e-5, weight_decay=0.01, fused=True)),
        "torch AdamW foreach": (
            "none",
            lambda ps: torch.optim.AdamW(groups(ps), lr=2e-5, weight_decay=0.01, foreach=True),
        ),
        "torch AdamW compiled": ("none", compiled_adamw),
        "bernoulli + torch fused, F p=0.3": ("F", lambda ps: BernoulliThenFused(ps, reserve_p=0.3)),
        "released algorithm eager, F p=0.3": ("F", lambda ps: EagerChildAdamW(ps, reserve_p=0.3)),
        "released algorithm eager, D p=0.1": (
            "D",
            lambda ps: EagerChildAdamW(ps, masks={p: (torch.rand_like(p) < 0.1).to(p.dtype) for p in ps}),
        ),
    }
    if not torch.cuda.is_available():
        del rows["torch AdamW compiled"]  # minutes of C++ compilation for each list of shapes
    for impl in impls:
        rows[f"ours ({impl}), no mask"] = ("none", ours(impl))
        rows[f"ours ({impl}), F p=0.3"] = ("F", ours(impl, reserve_p=0.3))
        for p in (0.1, 0.3):
            for kind, masks in (("", random_masks), (", clustered", clustered_masks)):
                for label, options in _D_ROWS.items():
                    if p == 0.1 or not label:
                        rows[f"ours ({impl}), D p={p}{kind}{label}"] = (
                            "D",
                            lambda ps, make=impl, masks=masks, p=p, options=options: ours(
                                make, mask=masks(ps, p), **options
                            )(ps),
                        )
    return rows
