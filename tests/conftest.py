"""Where tests run: every implementation on every device that this machine has."""

from __future__ import annotations

import os
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from childtune_kernels import ops


class Place(NamedTuple):
    """An implementation on a device."""

    impl: str
    device: str

    @property
    def kernels(self) -> ModuleType:
        return ops.implementation(self.impl, self.device)


_PLACES = [Place("reference", "cpu"), Place("csrc", "cpu")]
if os.environ.get("TRITON_INTERPRET") == "1":
    _PLACES.append(Place("triton", "cpu"))
_PLACES += [Place(impl, "cuda") for impl in ("reference", "csrc", "triton")]


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(
    params=[
        pytest.param(
            place, id=f"{place.impl}-{place.device}", marks=[pytest.mark.gpu] if place.device == "cuda" else []
        )
        for place in _PLACES
    ]
)
def place(request) -> Place:
    """One implementation on one device; CHILDTUNE_REQUIRE_CSRC=1 turns a missing csrc from a skip into a failure."""
    if reason := ops.unavailable(*request.param):
        required = request.param.impl == "csrc" and os.environ.get("CHILDTUNE_REQUIRE_CSRC") == "1"
        (pytest.fail if required else pytest.skip)(reason)
    return request.param


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(params=["torch", "hf"])
def dialect(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """Run on one thread: on a busy machine small models and lists can wait at barriers for many times their work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
