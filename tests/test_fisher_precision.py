"""What the check of two examples may take for rounding, and what it may not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from childtune_kernels.fisher import estimate_fisher
from childtune_kernels.fisher.precision import rounding

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FP64, FP32, FP16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
PRODUCTS = {"cpu": torch.backends.mkldnn.matmul, "cuda": torch.backends.cuda.matmul}
CONVOLUTIONS = {"cpu": torch.backends.mkldnn.conv, "cuda": torch.backends.cudnn.conv}


@pytest.fixture(autouse=True)
def exact_products():
    """Float32 products in float32, put back as they were."""
    settings = [*PRODUCTS.values(), *CONVOLUTIONS.values()]
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    yield
    for setting, value in zip(settings, before, strict=True):
        setting.fp32_precision = value


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_of_dtypes(device):
    assert rounding([FP64], device) == 2**-52
    assert rounding([FP64, FP32], device) == 2**-23
    assert rounding([FP16, FP32], device) == 2**-10
    assert rounding([FP64, BF16, FP16, torch.int64], device) == 2**-7


@pytest.mark.parametrize("kind, name, eps", [("cpu", "tf32", -10), ("cpu", "bf16", -7), ("cuda", "tf32", -10)])
@pytest.mark.parametrize("settings", [PRODUCTS, CONVOLUTIONS], ids=["products", "convolutions"])
def test_of_float32_products_in_fewer_bits(kind, name, eps, settings):
    settings[kind].fp32_precision = name
    assert rounding([FP32], torch.device(kind)) == 2**eps
    assert rounding([FP64], torch.device(kind)) == 2**-52 and rounding([BF16, FP32], torch.device(kind)) == 2**-7
    other = "cpu" if kind == "cuda" else "cuda"
    assert rounding([FP32], torch.device(other)) == 2**-23
    assert rounding([FP32], torch.device("meta")) == 2**-23


def test_of_the_older_settings():
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        assert rounding([FP32], CUDA) == 2**-10
        torch.backends.cuda.matmul.allow_tf32 = False
        assert rounding([FP32], CUDA) == 2**-23
        torch.set_float32_matmul_precision("high")
        assert rounding([FP32], CUDA) == 2**-10
        torch.set_float32_matmul_precision("medium")
        assert rounding([FP32], CUDA) >= 2**-10
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.allow_tf32 = before


class Rounded(nn.Module):
    """A model whose products are rounded to fewer bits, another way for each batch size, as kernels do."""

    def __init__(self, error: float, dtype: torch.dtype):
        super().__init__()
        self.inner, self.last = nn.Linear(8, 8).to(dtype), nn.Linear(8, 3).to(dtype)
        self.error = error

    def forward(self, x):
        y = self.inner(x)
        draw = torch.Generator().manual_seed(len(x))
        y = y * (1 + self.error * (2 * torch.rand(8, generator=draw) - 1).to(y))
        return self.last(y.tanh())


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]).float(), batch[1], reduction="none")


def examples(dtype):
    return torch.randn(6, 8).to(dtype), torch.tensor([0, 1, 2, 0, 1, 2])


def test_products_in_tf32_are_not_refused():
    model, batch = Rounded(2**-11, FP32), examples(FP32)
    with pytest.raises(ValueError, match="losses depend on their own example only"):
        estimate_fisher(model, [batch], cross_entropy)
    torch.backends.mkldnn.matmul.fp32_precision = "tf32"
    fisher = estimate_fisher(model, [batch], cross_entropy)
    assert not any(note.startswith("one example") for note in fisher.notes.values())


@pytest.mark.parametrize("dtype, error", [(BF16, 2**-8), (FP16, 2**-11), (FP32, 2**-24)], ids=str)
def test_rounding_of_the_models_dtype_is_not_refused(dtype, error):
    """The losses are float32 whatever the model computes in."""
    estimate_fisher(Rounded(error, dtype), [examples(dtype)], cross_entropy)


def test_rounding_of_autocast_is_not_refused():
    def loss(model, batch):
        with torch.autocast("cpu", BF16):
            return cross_entropy(model, batch)

    estimate_fisher(Rounded(2**-8, FP32), [examples(FP32)], loss)


@pytest.mark.parametrize("dtype, rounded", [(FP32, 1.0), (FP64, 1 + 2**-9)], ids=str)
def test_squares_are_of_the_input_that_autocast_makes(dtype, rounded):
    """That of float32, in bfloat16; float64 it leaves alone."""

    def loss(model, batch):
        with torch.autocast("cpu", BF16):
            return model(batch).sum(1)

    fisher = estimate_fisher(nn.Linear(4, 2).to(dtype), [torch.full((3, 4), 1 + 2**-9, dtype=dtype)], loss)
    assert fisher["weight"].equal(torch.full((2, 4), rounded**2, dtype=dtype))
    assert fisher.notes["weight"] == "product"


def normalised(model, batch):
    losses = cross_entropy(model, batch)
    return losses / losses.detach().mean()


def contrastive(model, batch):
    y = F.normalize(model(batch[0]), dim=1)
    return F.cross_entropy((y @ y.T).float() * 4, torch.arange(len(y)).roll(1), reduction="none")


def centred(model, batch):
    y = model(batch[0])
    return F.cross_entropy((y - y.mean(0)).float(), batch[1], reduction="none")


@pytest.mark.parametrize("dtype", [FP64, FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("loss", [normalised, contrastive, centred])
def test_losses_of_several_examples_are_refused(loss, dtype):
    torch.backends.mkldnn.matmul.fp32_precision = "tf32"
    model, batch = Rounded(0.0, dtype), examples(dtype)
    with pytest.raises(ValueError, match="losses depend on their own example only"):
        estimate_fisher(model, [batch], loss)
