"""Training on the digits: from scratch, and fine-tuning by each of the methods that are compared."""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .. import ChildAdamW, ChildMask, estimate_fisher
from ..measure.timing import synchronize
from .digits import CLASSES, Images, Protocol, Task, VisionTransformer

METHODS = {"vanilla": "vanilla AdamW", "F": "Child-Tuning_F", "D": "Child-Tuning_D"}
TUNING_SEED = 1000  # the seeds that choose learning rates start here, the reported ones at 0


class Run(NamedTuple):
    """One fine-tuning: held-out accuracy (%) after each of ``at`` steps, and the optimizer's median step in ms."""

    at: list[int]
    accuracy: list[float]
    step_ms: float
    impl: str


def pretrain(task: Task, protocol: Protocol, tick: Callable[[], object]) -> nn.Module:
    """Train a transformer on the old digits from scratch."""
    torch.manual_seed(0)
    model = VisionTransformer().to(task.pretrain.pixels.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    train(model, optimizer, task.pretrain, protocol.pretrain_steps, 64, 0, lambda step: tick())
    return model


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Images,
    steps: int,
    batch_size: int,
    seed: int,
    after_step: Callable[[int], object],
) -> float:
    """Train with a learning rate that warms up over a tenth of the steps and then falls linearly to 0.

    Returns:
        The median time of ``optimizer.step()`` in ms.
    """
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min((done + 1) / warmup, (steps - done) / (steps - warmup + 1))
    )
    order = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.long)
    times = []
    for step in range(1, steps + 1):
        if len(waiting) < batch_size:
            waiting = torch.randperm(len(images.labels), generator=order)
        rows, waiting = waiting[:batch_size], waiting[batch_size:]
        batch = images[rows.to(images.labels.device)]
        optimizer.zero_grad()
        cross_entropy(model(batch.pixels), batch.labels).backward()
        synchronize(batch.pixels.device)
        start = time.perf_counter()
        optimizer.step()
        synchronize(batch.pixels.device)
        times.append(1e3 * (time.perf_counter() - start))
        schedule.step()
        after_step(step)
    return statistics.median(times)


def drawn(task: Task, protocol: Protocol, seed: int) -> Images:
    """Return the training images that a seed draws."""
    rows = torch.randperm(len(task.pool.labels), generator=torch.Generator().manual_seed(seed))
    return task.pool[rows[: protocol.train_images].to(task.pool.labels.device)]


def with_fresh_head(pretrained: nn.Module, seed: int) -> nn.Module:
    """Return a copy of the pretrained model whose head is drawn anew."""
    model = copy.deepcopy(pretrained)
    torch.manual_seed(seed)
    model.head = nn.Linear(model.head.in_features, CLASSES).to(model.positions.device)
    return model


def per_example_loss(model: nn.Module, batch: Images) -> Tensor:
    """Return each image's loss, [n]."""
    return cross_entropy(model(batch.pixels), batch.labels, reduction="none")


def child_of(model: nn.Module, images: Images, share: float) -> ChildMask:
    """Choose the child of D: the share of the encoder layers' weights with the highest Fisher information.

    Patches, positions, the last norm and the head stay outside the mask, as in the released code, and so are trained
    fully.
    """
    fisher = estimate_fisher(model, [images], per_example_loss)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "outside the scope")  # that they are trained fully is the experiment
        return fisher.top(share, scope="released")


def make_optimizer(
    method: str, model: nn.Module, images: Images, lr: float, seed: int, share: float
) -> tuple[torch.optim.Optimizer, str]:
    """Return one method's optimizer and the name of its implementation."""
    if method == "vanilla":
        return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True), "torch fused"
    child = dict(reserve_p=share, seed=seed) if method == "F" else dict(mask=child_of(model, images, share))
    optimizer = ChildAdamW(model.named_parameters(), lr=lr, weight_decay=0.01, **child)
    return optimizer, optimizer.impl


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Return the share of images classified right, in %."""
    return 100 * (model(images.pixels).argmax(dim=1) == images.labels).double().mean().item()


def fine_tune(
    method: str,
    pretrained: nn.Module,
    task: Task,
    protocol: Protocol,
    lr: float,
    seed: int,
    held_out: Images,
    evaluations: int,
    tick: Callable[[], object],
) -> Run:
    """Fine-tune on the new digits; the seed draws the training images, the head, their order and F's masks.

    The same seed gives every method the same images, head and order, so methods can be compared seed by seed.
    """
    images = drawn(task, protocol, seed)
    model = with_fresh_head(pretrained, seed)
    optimizer, impl = make_optimizer(method, model, images, lr, seed, protocol.share)
    stops = {max(1, round(protocol.steps * i / evaluations)) for i in range(1, evaluations + 1)}
    curve: dict[int, float] = {}

    def after_step(step: int) -> None:
        if step in stops:
            curve[step] = accuracy(model, held_out)
        tick()

    step_ms = train(model, optimizer, images, protocol.steps, protocol.batch_size, seed, after_step)
    return Run(list(curve), list(curve.values()), step_ms, impl)
