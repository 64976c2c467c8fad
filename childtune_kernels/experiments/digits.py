"""A task and a model: a small vision transformer moves from the digits 0-4 to the digits 5-9 with few labels.

The images are scikit-learn's copy of the UCI optical digits: 1797 scans of handwritten digits, 8 x 8 pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

CLASSES = 5


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
