"""The demo's experiment: a small vision transformer moves from the digits 0-4 to the digits 5-9 with few labels.

The images are scikit-learn's copy of the UCI optical digits: 1797 scans of handwritten digits, 8 x 8 pixels.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

from .. import ChildAdamW, ChildMask, ops
from ..measure.timing import synchronize

METHODS = {"vanilla": "vanilla AdamW", "F": "Child-Tuning_F", "D": "Child-Tuning_D"}
CLASSES = 5
TUNING_SEED = 1000  # the seeds that choose learning rates start here, the reported ones at 0


@dataclass(frozen=True)
class Protocol:
    """What is run; every method gets the same.

    ``learning_rates`` are tried on ``tuning_seeds`` seeds of their own and judged on the validation images.
    ``share`` is p_F and p_D. ``evaluations`` is how often a reported run looks at the test images.
    """

    pretrain_steps: int = 300
    steps: int = 240
    batch_size: int = 16
    train_images: int = 100
    validation_images: int = 200
    test_images: int = 400
    learning_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    tuning_seeds: int = 2
    share: float = 0.3
    evaluations: int = 8

    def total_steps(self, methods: int, seeds: int) -> int:
        """Return how many training steps the whole experiment takes."""
        runs = methods * (len(self.learning_rates) * self.tuning_seeds + seeds)
        return self.pretrain_steps + runs * self.steps


class Images(NamedTuple):
    """Images, float32 [n, 1, 8, 8] in [0, 1], and their classes, int64 [n]."""

    pixels: Tensor
    labels: Tensor

    def __getitem__(self, rows: Tensor | slice) -> Images:
        return Images(self.pixels[rows], self.labels[rows])


class Task(NamedTuple):
    """The splits. ``pool`` is what each seed draws its own training images from; no two splits share an image."""

    pretrain: Images
    pool: Images
    validation: Images
    test: Images


class Run(NamedTuple):
    """One fine-tuning: held-out accuracy (%) after each of ``at`` steps, and the optimizer's median step in ms."""

    at: list[int]
    accuracy: list[float]
    step_ms: float
    impl: str


class EncoderLayer(nn.Module):
    """A pre-norm transformer encoder layer with four heads."""

    def __init__(self, width: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:  # [n, tokens, width]
        heads = self.query_key_value(self.attention_norm(hidden)).unflatten(-1, (3, 4, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # [n, heads, tokens, width / heads] each
        attended = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        hidden = hidden + self.attention_out(attended)
        return hidden + self.down(gelu(self.up(self.mlp_norm(hidden))))


class VisionTransformer(nn.Module):
    """Four encoder layers over the sixteen 2 x 2 patches of an image and a class token."""

    def __init__(self, width: int = 32, depth: int = 4):
        super().__init__()
        self.patches = nn.Conv2d(1, width, kernel_size=2, stride=2)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.layers = nn.Sequential(*(EncoderLayer(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patches(pixels).flatten(2).transpose(1, 2)  # [n, 16, width]
        hidden = torch.cat([self.class_token.expand(len(pixels), -1, -1), patches], dim=1) + self.positions
        return self.head(self.norm(self.layers(hidden)[:, 0]))


def load_task(protocol: Protocol, device: torch.device) -> Task:
    """Load the images and split them, always the same way."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    labels = torch.from_numpy(digits.target).long()
    images = Images(torch.from_numpy(digits.images).float()[:, None] / 16, labels % CLASSES)
    new = (labels >= CLASSES).nonzero()[:, 0]
    new = new[torch.randperm(len(new), generator=torch.Generator().manual_seed(0))]
    ends = (protocol.test_images, protocol.test_images + protocol.validation_images)
    splits = (images[labels < CLASSES], images[new[ends[1] :]], images[new[ends[0] : ends[1]]], images[new[: ends[0]]])
    return Task(*(Images(part.pixels.to(device), part.labels.to(device)) for part in splits))


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


def with_fresh_head(pretrained: nn.Module, seed: int) -> nn.Module:
    """Return a copy of the pretrained model whose head is drawn anew."""
    model = copy.deepcopy(pretrained)
    torch.manual_seed(seed)
    model.head = nn.Linear(model.head.in_features, CLASSES).to(model.positions.device)
    return model


def child_network(model: nn.Module, images: Images, share: float) -> ChildMask:
    """Choose the child of D: the share of the encoder layers' weights with the highest Fisher information.

    Batches of one image make a batch's gradient that of one example, so this is Eq. 10. The choice is global over
    the layers and exact in number; of equal scores the earlier weight wins. Patches, positions, the last norm and
    the head stay outside the mask, as in the released code, and so are trained fully.
    """
    scope = {name: param for name, param in model.named_parameters() if name.startswith("layers.")}
    fisher = [torch.zeros_like(param) for param in scope.values()]
    for pixels, label in zip(images.pixels.split(1), images.labels.split(1), strict=True):
        grads = torch.autograd.grad(cross_entropy(model(pixels), label), list(scope.values()))
        ops.square_accumulate_(fisher, [grad.contiguous() for grad in grads], 1 / len(images.labels))  # Eq. 10
    scores = torch.cat([score.view(-1) for score in fisher])
    order = scores.argsort(descending=True, stable=True)
    child = torch.zeros_like(scores, dtype=torch.bool)
    child[order[: round(share * len(order))]] = True
    parts = child.split([param.numel() for param in scope.values()])
    return ChildMask.from_dense({name: part.view_as(scope[name]) for name, part in zip(scope, parts, strict=True)})


def make_optimizer(
    method: str, model: nn.Module, images: Images, lr: float, seed: int, share: float
) -> tuple[torch.optim.Optimizer, str]:
    """Return one method's optimizer and the name of its implementation."""
    if method == "vanilla":
        return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True), "torch fused"
    child = dict(reserve_p=share, seed=seed) if method == "F" else dict(mask=child_network(model, images, share))
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
    rows = torch.randperm(len(task.pool.labels), generator=torch.Generator().manual_seed(seed))
    images = task.pool[rows[: protocol.train_images].to(task.pool.labels.device)]
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
