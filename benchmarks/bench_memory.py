"""Memory and time of whole training steps with packed gradients: `python benchmarks/bench_memory.py RESULT.json`.

Needs a CUDA machine and transformers. Models are built from their configuration with random weights, in bfloat16; the
child is a random tenth. A model that the device cannot hold is reported as such.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import transformers
from torch import nn

from childtune_kernels import ChildAdamW, ChildMask, ops, philox
from childtune_kernels.measure import results
from childtune_kernels.optim.memory import predict

P = 0.1
LLAMAS = {
    "llama-7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    "llama-30b": dict(hidden_size=6656, intermediate_size=17920, num_hidden_layers=60, num_attention_heads=52),
}


def sampled_child(model: nn.Module) -> ChildMask:
    """Return a child of about P of every parameter; exactly P, as `ChildMask.random` draws, would take minutes here."""
    named = dict(model.named_parameters())
    keys = {name: philox.stream_key(0, name) for name in named}
    sample = {n: (p.numel(), keys[n], 1, P, philox.RANDOM_CHILD, 0, p.device) for n, p in named.items()}
    return ChildMask({n: ops.bernoulli_bits(*s) for n, s in sample.items()}, {n: p.shape for n, p in named.items()})


def build(config: transformers.PretrainedConfig, kind: type[nn.Module]) -> nn.Module:
    """Return a model in bfloat16 on the device, in training mode."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return kind(config).train()
    finally:
        torch.set_default_dtype(before)


def whole_step(name: str, options: dict) -> dict:
    """Take four steps of a Llama, batch 1 x 512, checkpointed; return peak bytes a weight, times and losses."""
    model = build(transformers.LlamaConfig(**LLAMAS[name]), transformers.LlamaForCausalLM)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    optimizer = ChildAdamW(
        model.named_parameters(), lr=1e-4, mask=ChildMask.random(model, P, 0, device="cuda"), **options
    )
    ids = torch.randint(32000, (1, 512), device="cuda")
    seconds, losses = [], []
    for step in range(4):
        if step == 2:  # state exists by then
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    weights = sum(p.numel() for p in model.parameters())
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    counts = {n: optimizer.mask.count(n) for n in optimizer.mask}
    memory = optimizer.memory()
    predicted = predict(shapes, p=counts, weight_dtype=torch.bfloat16, **options)
    return {
        "weights": weights,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "peak_bytes_a_weight": torch.cuda.max_memory_allocated() / weights,
        "allocated_after_step": torch.cuda.memory_allocated(),
        "predicted": {**predicted.per_parameter(), "held": (predicted.weights + predicted.state) / weights},
        "counted": memory.per_parameter(),
        "seconds": seconds[2:],
        "losses": losses,
    }


def hook_cost(model: nn.Module, batch: dict, rounds: int) -> dict:
    """Time a model's backward pass with and without gradients being packed in it, alternating."""
    times: dict[str, list[float]] = {"plain": [], "packed": []}
    mask = sampled_child(model)
    for _ in range(rounds):
        for kind in times:
            optimizer = ChildAdamW(model.named_parameters(), mask=mask, pack_gradients=kind == "packed")
            for repeat in range(6):
                loss = model(**batch).loss
                torch.cuda.synchronize()
                start = time.perf_counter()
                loss.backward()
                torch.cuda.synchronize()
                if repeat >= 2:
                    times[kind].append((time.perf_counter() - start) * 1e3)
                optimizer.zero_grad()
            del optimizer
            gc.collect()
    median = {kind: statistics.median(values) for kind, values in times.items()}
    spread = {kind: [min(values), max(values)] for kind, values in times.items()}
    return {"milliseconds": median, "spread": spread, "ratio": median["packed"] / median["plain"]}


def hook_costs() -> dict:
    """Return the hooks' cost where the host limits the backward pass, and where the device does."""
    sizes = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    bert = build(transformers.BertConfig(**sizes), transformers.BertForSequenceClassification)
    costs = {}
    for examples, length in ((32, 128), (32, 512)):
        ids = torch.randint(30000, (examples, length), device="cuda")
        labels = torch.zeros(examples, dtype=torch.int64, device="cuda")
        costs[f"bert-large, {examples} x {length}"] = hook_cost(bert, {"input_ids": ids, "labels": labels}, 5)
    del bert
    llama = build(transformers.LlamaConfig(**LLAMAS["llama-7b"]), transformers.LlamaForCausalLM)
    for examples in (1, 4):
        ids = torch.randint(32000, (examples, 512), device="cuda")
        costs[f"llama-7b, {examples} x 512"] = hook_cost(llama, {"input_ids": ids, "labels": ids}, 2)
    return costs


def measure(models: list[str]) -> Iterator[dict]:
    """Measure the hooks, then each model's steps."""
    yield {"p": P, "batch": [1, 512], "steps": {}}
    yield {"hooks": if_it_fits(hook_costs)}
    for name in models:
        for option in ("pack_gradients", "fused_backward"):
            yield {"steps": {f"{name}, {option}": if_it_fits(functools.partial(whole_step, name, {option: True}))}}


def if_it_fits(part: Callable[[], dict]) -> dict:
    """Return what is measured, or that the device cannot hold it."""
    gc.collect()
    torch.cuda.empty_cache()
    try:
        return part()
    except torch.cuda.OutOfMemoryError as error:
        return {"out_of_memory": str(error).split(".")[0]}


if __name__ == "__main__":
    raise SystemExit(results.main(__doc__, measure, models=tuple(LLAMAS)))
