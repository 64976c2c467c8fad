"""The optimizer step under pytest-benchmark: `pytest benchmarks/bench_step.py`.

The same contenders, parity gate and synchronised step as `childtune bench`, at a size that suits continuous runs.
"""

from __future__ import annotations

import pytest
import torch

from childtune_kernels import ops
from childtune_kernels.measure.parity import difference
from childtune_kernels.measure.peers import contenders
from childtune_kernels.measure.results import DTYPES
from childtune_kernels.measure.shapes import SHAPES
from childtune_kernels.measure.timing import step_and_wait

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMPLS = [impl for impl in ("triton", "csrc", "reference") if ops.unavailable(impl, DEVICE.type) is None]
ROWS = contenders(IMPLS)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request) -> torch.dtype:
    dtype = DTYPES[request.param]
    for impl in IMPLS:
        how = difference(impl, DEVICE, dtype)
        assert how is None, f"{impl}: no numbers: {how}"
    return dtype


@pytest.mark.parametrize("name", [name for name in ROWS if "compiled" not in name and "released" not in name])
def test_step(benchmark, name, dtype):
    _, factory = ROWS[name]
    shapes = SHAPES["bert-large" if DEVICE.type == "cuda" else "bert-layer"]()
    params = [torch.nn.Parameter(torch.randn(shape, device=DEVICE, dtype=dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = factory(params)
    benchmark.extra_info["device"] = str(DEVICE)
    benchmark.pedantic(step_and_wait, args=(optimizer.step, DEVICE), rounds=5, warmup_rounds=2)
