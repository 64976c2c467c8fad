"""How much the child networks of different Fisher rules overlap: `python benchmarks/bench_overlap.py RESULT.json`.

On the demo's model, a small vision transformer really pre-trained on the digits 0-4, for the task of the digits 5-9
with 100 labelled images and a fresh head. Runs on a CPU in seconds; needs scikit-learn.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path

import torch

from childtune_kernels import ChildMask, estimate_fisher
from childtune_kernels.cli.bench import commit
from childtune_kernels.experiments import digits, training
from childtune_kernels.measure import timing
from childtune_kernels.measure.peers import touched_groups

RULES = ("exact", "batch", "released")
SHARES = (0.1, 0.3)


def children(pretrained, task, protocol, seed: int) -> dict[float, dict[str, ChildMask]]:
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


def main() -> None:
    """Measure and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the same numbers on any number of cores
    protocol = digits.Protocol()
    task = digits.load_task(protocol, torch.device("cpu"))
    pretrained = training.pretrain(task, protocol, lambda: None)
    report = {"date": date.today().isoformat(), "commit": commit(), "machine": timing.machine(torch.device("cpu"))}
    report |= {"seeds": args.seeds, "images": protocol.train_images, "batch": protocol.batch_size, "shares": {}}
    for seed in range(args.seeds):
        for p, masks in children(pretrained, task, protocol, seed).items():
            entry = report["shares"].setdefault(str(p), {"overlap": {}, "touched": {}})
            for rule, mask in masks.items():
                if rule != "exact":
                    entry["overlap"].setdefault(f"exact, {rule}", []).append(masks["exact"].jaccard(mask))
                entry["touched"].setdefault(rule, []).append(touched_groups(mask))
            entry["overlap"].setdefault("batch, released", []).append(masks["batch"].jaccard(masks["released"]))
    args.result.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["shares"], indent=1))


if __name__ == "__main__":
    main()
