"""How much the child networks of different Fisher rules overlap: `python benchmarks/bench_overlap.py RESULT.json`.

On the demo's model, a small vision transformer really pre-trained on the digits 0-4, for the task of the digits 5-9
with 100 labelled images and a fresh head. Runs on a CPU in seconds; needs scikit-learn.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from childtune_kernels import ChildMask, estimate_fisher
from childtune_kernels.experiments import digits, training
from childtune_kernels.experiments.compare import one_thread
from childtune_kernels.measure import results
from childtune_kernels.measure.peers import touched_groups

RULES = ("exact", "batch", "released")
SHARES = (0.1, 0.3)


def children(
    pretrained: nn.Module, task: digits.Task, protocol: digits.Protocol, seed: int
) -> dict[float, dict[str, ChildMask]]:
    """Return share -> rule -> child of the encoder layers, for one draw of training images and head."""
    images = training.drawn(task, protocol, seed)
    model = training.with_fresh_head(pretrained, seed)
    size = protocol.batch_size
    batches = [images[i : i + size] for i in range(0, protocol.train_images, size)]
    fishers = {rule: estimate_fisher(model, batches, training.per_example_loss, rule=rule) for rule in RULES}
    found = {p: {rule: fisher.top(p, scope="released") for rule, fisher in fishers.items()} for p in SHARES}
    for p, masks in found.items():
        masks["random"] = ChildMask.random({n: masks["exact"].shape(n) for n in masks["exact"]}, p, seed)
    return found


def measure(seeds: int) -> Iterator[dict]:
    """Choose the children of several draws, and compare them."""
    protocol = digits.Protocol()
    task = digits.load_task(protocol, torch.device("cpu"))
    shares: dict[str, dict] = {}
    with one_thread():
        pretrained = training.pretrain(task, protocol, lambda: None)
        for seed in range(seeds):
            for p, masks in children(pretrained, task, protocol, seed).items():
                add_overlaps(shares.setdefault(str(p), {"overlap": {}, "touched": {}}), masks)
    yield {"seeds": seeds, "images": protocol.train_images, "batch": protocol.batch_size, "shares": shares}


def add_overlaps(entry: dict, masks: dict[str, ChildMask]) -> None:
    """Add what the children of one draw have in common to the lists of one share."""
    for rule, mask in masks.items():
        if rule != "exact":
            entry["overlap"].setdefault(f"exact, {rule}", []).append(masks["exact"].jaccard(mask))
        entry["touched"].setdefault(rule, []).append(touched_groups(mask))
    entry["overlap"].setdefault("batch, released", []).append(masks["batch"].jaccard(masks["released"]))


if __name__ == "__main__":
    raise SystemExit(results.main(__doc__, measure, device="cpu", seeds=5))
