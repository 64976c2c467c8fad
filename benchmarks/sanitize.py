"""Every CUDA kernel once, on awkward small sizes: what `make gpu` runs under compute-sanitizer.

Without torch's caching allocator each tensor is an allocation of its own, so an access beside it is found.
"""

from __future__ import annotations

import math
import os

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch  # noqa: E402

from childtune_kernels import ChildAdamW, ops  # noqa: E402
from childtune_kernels.measure.peers import random_masks  # noqa: E402

SIZES = [(0,), (1,), (31,), (33,), (511,), (1025,), (65, 67)]


def step(impl: str, dtype: torch.dtype, misaligned: int, **options) -> None:
    """Two optimizer steps, all moved in between, with gradients that are views at an odd offset where asked."""
    params = [torch.nn.Parameter(torch.randn(s, device="cuda").to(dtype)) for s in SIZES]
    if options.pop("masked", False):
        options["mask"] = random_masks(params, 0.3)
    optimizer = ChildAdamW(params, impl=impl, **options)
    for _ in range(2):
        for p in params:
            buffer = torch.randn(p.numel() + misaligned, device="cuda").to(dtype)
            p.grad = buffer[misaligned:].view(p.shape)
        optimizer.step()
        offload(optimizer, params)


def offload(optimizer: ChildAdamW, params: list[torch.nn.Parameter]) -> None:
    """Move weights and state to the CPU and back behind their tensors: what lay at their addresses is freed then."""
    tensors = [*params, *(tensor for entry in optimizer.state.values() for tensor in entry.values())]
    for tensor in tensors:
        tensor.data = tensor.data.cpu()
    taken = [torch.empty_like(tensor, device="cuda") for tensor in tensors]
    for tensor in reversed(tensors):
        tensor.data = tensor.data.cuda()
    del taken


def bits(impl: str) -> None:
    """The bit ops and the accumulator."""
    kernels = ops.implementation(impl, "cuda")
    device = torch.device("cuda", torch.cuda.current_device())
    for numel in (1, 31, 33, 4097):
        words = kernels.bernoulli_bits(numel, 5, 1, 0.3, 0, 0, device)
        kernels.popcount_bits(words)
        kernels.overlap_bits(words, words)
        kernels.overlap_bits(words[1:], words[1:])
        for dtype in (torch.float32, torch.bfloat16):
            scores = torch.randn(numel, device="cuda").to(dtype)
            misaligned = scores[1:]
            kernels.threshold_bits([scores, misaligned], [0.1, 0.1], [0, numel], True)
            for second, shift, digits in ((0, 21, 11), (2**31, 20, 11), (0, 28, 4), (2**31, 0, 0)):
                kernels.score_histogram([scores, misaligned], [0, second], shift, digits)
            kernels.square_accumulate_([torch.zeros(numel, device="cuda")], [scores], 0.5)


def fisher() -> None:
    """The sums of squared per-example gradients, in each of the kernel's ways to read."""
    kernels = ops.implementation("triton", "cuda")
    for b, t, o, i in ((2, 5, 7, 9), (1, 64, 64, 128), (2, 129, 130, 65), (2, 128, 128, 128), (3, 20, 48, 80)):
        for dtype in (torch.float32, torch.bfloat16):
            d = torch.randn(b, t, o, device="cuda").to(dtype)
            kernels.fisher_linear_(torch.zeros(o, i, device="cuda"), d, torch.randn(b, t, i, device="cuda").to(dtype))
            plain = torch.zeros(o, device="cuda")
            kernels.fisher_columns_(torch.zeros(o, device="cuda"), d, torch.randn(b, t, o, device="cuda"), plain)


if __name__ == "__main__":
    for impl in ("triton", "csrc"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for misaligned in (0, 1):
                step(impl, dtype, misaligned)
                step(impl, dtype, misaligned, reserve_p=0.3)
                step(impl, dtype, misaligned, masked=True)
                step(impl, dtype, misaligned, masked=True, reserve_p=0.3)
                step(impl, dtype, misaligned, masked=True, pack_gradients=True, max_grad_norm=math.inf)
                step(impl, dtype, misaligned, masked=True, state="dense")
                for low in ("master", "kahan", "stochastic"):
                    step(impl, dtype, misaligned, reserve_p=0.3, low_precision=low)
                    step(impl, dtype, misaligned, masked=True, low_precision=low)
                step(impl, dtype, misaligned, masked=True, decay="all", max_grad_norm=1.0)
        bits(impl)
    fisher()
    torch.cuda.synchronize()
    print("every kernel ran")
