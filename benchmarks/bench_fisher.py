"""Exact Fisher information against what it is measured by: `python benchmarks/bench_fisher.py RESULT.json` (CUDA).

A linear layer's rule against the plain weight gradient of the same shape; a whole pass of BERT-large against a plain
forward and backward pass, eager and captured, and against one example at a time. The parity check stands beside each:
a row that misses its error bound is refused.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from childtune_kernels import ops
from childtune_kernels.fisher import classification_loss, estimate_fisher
from childtune_kernels.measure import results, timing

LINEAR = ((32, 128, 4096, 1024), (8, 512, 4096, 4096), (16, 128, 1024, 1024))
BOUNDS = {torch.bfloat16: 1e-6, torch.float32: 1e-5}  # relative error of a linear rule against float64
DEVICE = torch.device("cuda")


def linear_row(shape: tuple[int, int, int, int], dtype: torch.dtype) -> dict:
    """Time the rule and the plain weight gradient on one layer; B, T, O, I."""
    b, t, o, i = shape
    d, x = torch.randn(b, t, o, device=DEVICE, dtype=dtype), torch.randn(b, t, i, device=DEVICE, dtype=dtype)
    total = torch.zeros(o, i, device=DEVICE)
    ops.fisher_linear_(total, d, x)
    exact = torch.zeros_like(total, dtype=torch.float64)
    for d_j, x_j in zip(d.double(), x.double(), strict=True):
        exact += (d_j.T @ x_j).square()
    error = float((total - exact).norm() / exact.norm())
    kernels = ops.implementation("triton", "cuda")
    plain = device_time(lambda: d.flatten(0, 1).T @ x.flatten(0, 1))
    ours = device_time(lambda: kernels.fisher_linear_(total, d, x))
    return {"shape": shape, "dtype": str(dtype), "error": error, "plain": plain, "ours": ours,
            "ratio": ours / plain, "refused": error > BOUNDS[dtype]}  # fmt: skip


def device_time(function: Callable[[], object], count: int = 20) -> float:
    """Return the milliseconds of one call without the host's: from a captured graph of several."""
    function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            function()
    return timing.time_steps(graph.replay, DEVICE, 5)["device"] / count


def bert_large() -> tuple[nn.Module, dict[str, Tensor]]:
    """Return BERT-large with a two-class head, random weights, and a batch of 16 x 128."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    model = BertForSequenceClassification(config).to(DEVICE).eval()
    ids = torch.randint(0, config.vocab_size, (16, 128), device=DEVICE)
    return model, {"input_ids": ids, "labels": torch.randint(0, 2, (16,), device=DEVICE)}


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """bfloat16 autocast, one loss an example."""
    with torch.autocast("cuda", torch.bfloat16):
        return classification_loss(model, batch)


def milliseconds_a_batch(function: Callable[[int], object], batches: int) -> float:
    """Return the time of a batch: two runs of different length, to leave out what is done once."""
    times = []
    for count in (2, 2 + batches):
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function(count)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return (times[1] - times[0]) / batches


def plain_graph(model: nn.Module, batch: dict[str, Tensor]) -> torch.cuda.CUDAGraph:
    """Capture a plain forward and backward pass."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model.zero_grad()
            loss(model, batch).sum().backward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    model.zero_grad()
    with torch.cuda.graph(graph):
        loss(model, batch).sum().backward()
    return graph


def peak(function: Callable[[], object]) -> int:
    """Return the most bytes allocated while a function runs."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def whole_pass(rounds: int) -> dict:
    """Time the pass of BERT-large, in milliseconds a batch of 16."""
    model, batch = bert_large()
    rows: dict = {name: [] for name in ("plain", "exact", "plain graph", "exact graph", "one at a time")}

    def plain(count: int) -> None:
        for _ in range(count):
            model.zero_grad()
            loss(model, batch).sum().backward()

    def exact(count: int, graph: bool = False) -> None:
        estimate_fisher(model, [batch] * count, loss, check=False, graph=graph)

    def alone(count: int) -> None:
        names = list(model.parameters())
        sums = [torch.zeros_like(p) for p in names]
        for _ in range(count):
            for j in range(16):
                one = {key: value[j : j + 1] for key, value in batch.items()}
                grads = torch.autograd.grad(loss(model, one).sum(), names)
                ops.square_accumulate_(sums, list(grads), 1.0)

    def replay(count: int) -> None:
        for _ in range(count):
            graph.replay()

    graph = plain_graph(model, batch)
    plain(3), exact(2)
    for _ in range(rounds):
        rows["plain"].append(milliseconds_a_batch(plain, 20))
        rows["exact"].append(milliseconds_a_batch(exact, 20))
        rows["plain graph"].append(milliseconds_a_batch(replay, 150))
        rows["exact graph"].append(milliseconds_a_batch(lambda count: exact(count, graph=True), 150))
        rows["one at a time"].append(milliseconds_a_batch(alone, 2))
    graph = None
    model.zero_grad()
    torch.cuda.empty_cache()
    memory = {"plain": peak(lambda: plain(1))}
    model.zero_grad()
    memory["exact"] = peak(lambda: exact(1))
    memory["information"] = 4 * sum(p.numel() for p in model.parameters())
    medians = {name: statistics.median(values) for name, values in rows.items()}
    return {"milliseconds": rows, "memory": memory, "ratios": {
        "eager": medians["exact"] / medians["plain"],
        "graph": medians["exact graph"] / medians["plain graph"],
        "one at a time": medians["one at a time"] / medians["exact"],
        "memory beyond plain, of the information": (memory["exact"] - memory["plain"]) / memory["information"],
    }}  # fmt: skip


def measure(rounds: int, only: list[str]) -> Iterator[dict]:
    """Measure the linear rule row by row, then the pass."""
    if "linear" in only:
        for shape, dtype in [(shape, dtype) for dtype in BOUNDS for shape in LINEAR for _ in range(rounds)]:
            row = linear_row(shape, dtype)
            why = f"{shape}, {dtype}: error {row['error']:.1e} is above {BOUNDS[dtype]:.0e}"
            yield {"linear": [row], "refused": [why] * row["refused"]}
    if "pass" in only:
        yield {"pass": whole_pass(rounds)}


if __name__ == "__main__":
    raise SystemExit(results.main(__doc__, measure, rounds=3, only=("linear", "pass")))
