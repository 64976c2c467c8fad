"""The child network of BERT-large by score: `python benchmarks/bench_selection.py RESULT.json` on a CUDA machine.

A row is measured only if its bits are those that a stable sort of all scores puts first, and is beside that sort. The
scores are as the Fisher information of a trained model: squares over many octaves, a tenth of them exact zeros (words
that no example has); "ties" are few distinct values, so that the last one is shared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from childtune_kernels import ChildMask, ops, selection
from childtune_kernels.measure import results, timing
from childtune_kernels.measure.shapes import SHAPES


def fisher_like(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return squares of normal numbers of many scales, a tenth of the rows 0."""
    scale = torch.randn(shape[0], *(1 for _ in shape[1:]), device=device).mul(2).exp()
    scale[torch.rand(scale.shape, device=device) < 0.1] = 0
    return (torch.randn(shape, device=device) * scale * 1e-5).square_()


def few_values(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return scores of 16 values, about as many of each."""
    return torch.randint(0, 16, shape, device=device).float()


KINDS = {"fisher": fisher_like, "ties": few_values}


def as_mask(scores: dict[str, Tensor], p: float, impl: str) -> ChildMask:
    """Return what `Fisher.top` returns."""
    words = selection.select_words(scores, p, impl=impl)
    return ChildMask(words, {name: tensor.shape for name, tensor in scores.items()})


def expected_words(scores: dict[str, Tensor], p: float) -> list[Tensor]:
    """Return each tensor's bits by a stable sort of the concatenation."""
    flat = torch.cat([tensor.view(-1) for tensor in scores.values()])
    order = torch.sort(flat, stable=True, descending=True).indices[: round(p * flat.numel())]
    bits = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device).index_fill_(0, order, True)
    return [ops.pack_bits(own) for own in bits.split([tensor.numel() for tensor in scores.values()])]


def measure_call(step: Callable[[], object], device: torch.device, repeats: int, result_bytes: int = 0) -> dict:
    """Time a call that ends on the host, and count what it allocates beyond its result."""
    times = timing.time_steps(step, device, repeats)
    times = {name: times[name] for name in ("step", "step_min", "step_max")}
    return {"ms": times, "extra MiB": (timing.extra_memory(step, device) - result_bytes) / 2**20}


def measure_kind(kind: str, p: float, device: torch.device, repeats: int) -> tuple[dict, list[str]]:
    """Return the rows of one kind of scores, and why implementations are refused."""
    scores = {str(i): KINDS[kind](shape, device) for i, shape in enumerate(SHAPES["bert-large"]())}
    expected = expected_words(scores, p)
    result_bytes = sum(words.nbytes for words in expected)
    rows, refused = {}, []
    for impl in [i for i in ("triton", "csrc") if ops.unavailable(i, "cuda") is None]:
        pack = functools.partial(selection.select_words, scores, p, impl=impl)
        if not all(torch.equal(*pair) for pair in zip(pack().values(), expected, strict=True)):
            refused.append(f"{impl} selects other weights of {kind} scores than a stable sort")
            continue
        kernels = ops.implementation(impl, "cuda")
        tensors, digits = ops.tensors.TensorList(scores.values()), kernels.DIGITS
        count_args = tensors, [0] * len(tensors), 32 - digits, digits
        pack_args = tensors, [0.5] * len(tensors), [0] * len(tensors), False
        rows[impl] = {
            "select and pack": measure_call(pack, device, repeats, result_bytes),
            "select, with ChildMask": measure_call(lambda impl=impl: as_mask(scores, p, impl), device, repeats),
            "one histogram, device ms": timing.time_steps(
                lambda kernels=kernels, args=count_args: kernels.score_histogram(*args), device, repeats
            )["device"],
            "packing, device ms": timing.time_steps(
                lambda kernels=kernels, args=pack_args: kernels.threshold_bits(*args), device, repeats
            )["device"],
        }
    flat = torch.cat([tensor.view(-1) for tensor in scores.values()])
    rows["torch.sort, without concatenation and packing"] = measure_call(lambda: torch.sort(flat), device, repeats)
    return rows, refused


def measure(p: float, repeats: int) -> Iterator[dict]:
    """Select the share ``p`` of BERT-large's weights, by both kinds of scores."""
    device = torch.device("cuda", torch.cuda.current_device())
    weights = sum(torch.Size(shape).numel() for shape in SHAPES["bert-large"]())
    yield {"scores": weights, "p": p, "copy bandwidth, GB/s": timing.copy_bandwidth(device) / 1e9}
    for kind in KINDS:
        rows, refused = measure_kind(kind, p, device, repeats)
        yield {"rows": {kind: rows}, "refused": refused}


if __name__ == "__main__":
    raise SystemExit(results.main(__doc__, measure, p=0.1, repeats=20))
