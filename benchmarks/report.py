"""Writes the plots and the tables of both READMEs from the result files: `python benchmarks/report.py`."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

from childtune_kernels.experiments import compare
from childtune_kernels.measure.results import summary

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FILES = (
    "h200-bert-large-float32",
    "h200-bert-large-bfloat16",
    "h200-bert-large-float32-group-each",
    "h200-llama-7b-bfloat16",
    "amd-epyc-2-threads-bert-small-float32",
    "amd-epyc-2-threads-bert-small-bfloat16",
)
PLOT = RESULTS / "step.png"
COLOURS = {"ours": "#1b6ca8", "torch": "#9a9a9a", "released": "#d0743c", "bernoulli": "#d0743c"}


def load(name: str) -> dict:
    """Read one result file."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def section(name: str) -> str:
    """Return one result file as a Markdown table with its conditions above."""
    report = load(name)
    machine = report["machine"]
    where = [machine["device"], f"torch {machine['torch']}", f"Triton {machine['triton']}"]
    where += [f"driver {machine['driver']}"] if "driver" in machine else [f"{machine['threads']} threads"]
    rows = summary(report)
    baseline = rows["torch AdamW fused"]["step"]
    lines = [
        f"**{report['model']}, {report['dtype']}**: {report['tensors']} tensors, "
        f"{report['parameters'] / 1e6:.0f} M weights, parameter groups: {report['groups']}. {', '.join(where)}. "
        f"{len(report['copy_bandwidth'])} rounds, commit {report['commit']}.",
        "",
        "| | step, ms (rounds) | against torch fused | host, ms | device, ms | of copy bandwidth | launches |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for label, row in rows.items():
        if label.startswith("ours") and "busy" not in row:  # a file from before D's state was packed
            label = label.replace("D p=0.1", "D p=0.1, dense state")
        numbers = [f"{row[key]:.2f}" if key in row else "" for key in ("host", "device")]
        share = f"{row['share']:.3f}" if "share" in row else ""
        lines.append(
            f"| {label} | {row['step']:.2f} ({row['least']:.2f} .. {row['most']:.2f}) | {row['step'] / baseline:.2f} | "
            f"{numbers[0]} | {numbers[1]} | {share} | {row['launches'] or ''} |"
        )
    return "\n".join(lines)


def child_section() -> str:
    """Return the time that kernels of D run, and what its state takes, as a Markdown table."""
    reports = [load(f"h200-bert-large-{dtype}-child") for dtype in ("float32", "bfloat16")]
    machine = reports[0]["machine"]
    where = f"{machine['device']}, torch {machine['torch']}, Triton {machine['triton']}, driver {machine['driver']}"
    lines = [
        "| | kernels, ms (rounds) | against torch fused | groups of 16 touched | of the limit | state, B a weight |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for report in reports:
        baseline = statistics.median(r["busy"] for r in report["rows"]["torch AdamW fused"])
        for label, rounds in report["rows"].items():
            busy = [r["busy"] for r in rounds]
            touched = f"{rounds[0]['touched']:.2f}" if "touched" in rounds[0] else ""
            state = f"{rounds[0]['state_bytes'] / report['parameters']:.2f}" if touched else ""
            limit = ""
            if touched and report["dtype"] == "float32" and "dense" not in label:
                limit = f"{_least_seconds(report, rounds[0], label) / statistics.median(busy) * 1e3:.2f}"
            lines.append(
                f"| {report['dtype']}: {label} | {statistics.median(busy):.3f} ({min(busy):.3f} .. {max(busy):.3f}) | "
                f"{statistics.median(busy) / baseline:.3f} | {touched} | {limit} | {state} |"
            )
    rounds = len(reports[0]["copy_bandwidth"])
    return "\n".join([*lines, "", f"{where}. {rounds} rounds, commit {reports[0]['commit']}."])


SPEED = ("torch AdamW fused", "ours (triton), no mask", "ours (triton), F p=0.3", "ours (triton), D p=0.1")
SPEED += ("ours (triton), D p=0.1, clustered",)


def speed_section() -> str:
    """Return the rows of `child_section` that a newcomer asks for, both dtypes side by side."""
    reports = [load(f"h200-bert-large-{dtype}-child") for dtype in ("float32", "bfloat16")]
    lines = ["| | float32, ms | of torch fused | bfloat16, ms | of torch fused |", "| --- | --- | --- | --- | --- |"]
    for label in SPEED:
        cells = []
        for report in reports:
            busy, baseline = (statistics.median(r["busy"] for r in report["rows"][k]) for k in (label, SPEED[0]))
            cells += [f"{busy:.2f}", f"{busy / baseline:.2f}"]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    machine = reports[0]["machine"]
    where = f"{machine['device']}, torch {machine['torch']}, Triton {machine['triton']}"
    return "\n".join(
        [*lines, "", f"{where}. Medians of {len(reports[0]['copy_bandwidth'])} rounds, commit {reports[0]['commit']}."]
    )


def _least_seconds(report: dict, row: dict, label: str) -> float:
    """Return the seconds that a packed fp32 step would take if memory moved 64-byte pieces and nothing else.

    Of each piece touched the weight is read and written and a full gradient read; an entry of the child has two
    moments, read and written, an index and perhaps a packed gradient.
    """
    packed = "packed gradient" in label
    entries = row["state_bytes"] / 12
    moved = row["touched"] * report["parameters"] * 4 * (2 if packed else 3) + entries * (24 if packed else 20)
    return moved / statistics.median(report["copy_bandwidth"])


def memory_section() -> str:
    """Return the peak memory of whole training steps as a Markdown table."""
    report = load("h200-memory")
    header = ["one step, batch 1 x 512, bfloat16, p = 0.1", "weights", "peak, GB", "peak, B a weight"]
    header += ["predicted, without activations", "s a step"]
    lines = [f"| {' | '.join(header)} |", "| --- | --- | --- | --- | --- | --- |"]
    for label, row in report["steps"].items():
        cells = [label, f"{row['weights'] / 1e9:.2f} G", f"{row['peak_bytes'] / 1e9:.1f}"]
        cells += [f"{row['peak_bytes_a_weight']:.2f}", f"{row['predicted']['total']:.2f}"]
        lines.append(f"| {' | '.join(cells)} | {statistics.median(row['seconds']):.2f} |")
    lines += ["", "| backward pass, bfloat16, p = 0.1 | plain, ms | packing, ms | ratio |", "| --- | --- | --- | --- |"]
    for label, row in report["hooks"].items():
        times = (f"{row['milliseconds'][k]:.1f} ({row['spread'][k][0]:.1f} .. {row['spread'][k][1]:.1f})"
                 for k in ("plain", "packed"))  # fmt: skip
        lines.append(f"| {label} | {' | '.join(times)} | {row['ratio']:.2f} |")
    return "\n".join([*lines, "", f"{report['machine']['device']}, commit {report['commit']}."])


def overlap_section() -> str:
    """Return how much the children of three Fisher rules and a random one overlap, as a Markdown table."""
    report = load("overlap-digits")

    def shown(values: list[float]) -> str:
        return f"{statistics.mean(values):.2f} ({min(values):.2f} .. {max(values):.2f})"

    shares = list(report["shares"])
    lines = [f"| Jaccard overlap | {' | '.join(f'p = {p}' for p in shares)} |", "| --- |" + " --- |" * len(shares)]
    for pair in report["shares"][shares[0]]["overlap"]:
        cells = [shown(report["shares"][p]["overlap"][pair]) for p in shares]
        lines.append(f"| {pair.replace(', ', ' and ')} | {' | '.join(cells)} |")
    for rule in ("exact", "random"):
        cells = [shown(report["shares"][p]["touched"][rule]) for p in shares]
        lines.append(f"| groups of 16 weights touched, {rule} | {' | '.join(cells)} |")
    about = f"{report['seeds']} draws of {report['images']} images and a head, batches of {report['batch']}"
    return "\n".join([*lines, "", f"{about}; mean (least .. most). Commit {report['commit']}."])


def fisher_section() -> str:
    """Return the Fisher pass and the linear rule as Markdown tables, with each row's bound of error beside it."""
    report = load("h200-fisher")

    def shown(times: list[float], digits: int) -> str:
        low, high = (f"{value:.{digits}f}" for value in (min(times), max(times)))
        return f"{statistics.median(times):.{digits}f} ({low} .. {high})"

    def ratio(times: list[float], other: list[float]) -> str:
        return f"{statistics.median(times) / statistics.median(other):.2f}"

    times = report["pass"]["milliseconds"]
    lines = [
        "| BERT-large, a batch of 16 x 128, bfloat16 autocast | ms (rounds) | against eager plain |",
        "| --- | --- | --- |",
    ]
    labels = {"plain": "plain forward and backward", "plain graph": "the same, CUDA graph", "exact": "exact pass",
              "exact graph": "exact pass, `graph=True`", "one at a time": "one example at a time"}  # fmt: skip
    lines += [
        f"| {label} | {shown(times[key], 1)} | {ratio(times[key], times['plain'])} |" for key, label in labels.items()
    ]
    lines += [
        "",
        "| linear rule: B, T, O, I | ms (rounds) | plain weight gradient, ms | ratio | relative error, most |",
    ]
    lines.append("| --- | --- | --- | --- | --- |")
    rows: dict = {}
    for row in report["linear"]:
        rows.setdefault((row["dtype"].removeprefix("torch."), *row["shape"]), []).append(row)
    for (dtype, *shape), own in rows.items():
        ours, plain = ([row[key] for row in own] for key in ("ours", "plain"))
        error = max(row["error"] for row in own)
        label = f"{dtype}, {', '.join(map(str, shape))}"
        lines.append(f"| {label} | {shown(ours, 3)} | {shown(plain, 3)} | {ratio(ours, plain)} | {error:.1e} |")
    memory = f"{report['pass']['ratios']['memory beyond plain, of the information']:.2f}"
    machine = report["machine"]
    where = f"{machine['device']}, torch {machine['torch']}, Triton {machine['triton']}, commit {report['commit']}"
    return "\n".join([*lines, "", f"Memory beyond the plain pass: {memory} of the information's own. {where}."])


def plot() -> None:
    """Draw the step times of the two GPU files, rounds as whiskers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, name in zip(axes, FILES[:2], strict=True):
        report = load(name)
        rows = summary(report)
        labels = list(rows)[::-1]
        steps = [rows[label]["step"] for label in labels]
        whiskers = [
            [rows[k]["step"] - rows[k]["least"] for k in labels],
            [rows[k]["most"] - rows[k]["step"] for k in labels],
        ]
        axis.barh(labels, steps, xerr=whiskers, color=[COLOURS[label.split()[0]] for label in labels])
        axis.set_xscale("log")
        axis.set_xlim(left=1)
        for i, step in enumerate(steps):
            axis.text(1.05, i, f"{step:.2f}", va="center", fontsize=8, color="white")
        axis.set_xlabel("ms a step, host included (log scale)")
        axis.set_title(f"{report['model']}, {report['dtype']}, {report['machine']['device']}", fontsize=10)
    figure.savefig(PLOT, dpi=110)


def write(readme: Path, blocks: dict[str, str]) -> None:
    """Put tables between a file's markers."""
    text = readme.read_text()
    for marker, block in blocks.items():
        begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
        text = re.sub(f"{begin}.*{end}", lambda _, b=begin, k=block, e=end: f"{b}\n{k}\n{e}", text, flags=re.S)
    readme.write_text(text)


def tables() -> dict[str, str]:
    """Return the blocks of benchmarks/README.md."""
    body = "\n\n".join(section(name) for name in FILES if (RESULTS / f"{name}.json").exists())
    blocks = {"bench": body, "child": child_section(), "memory": memory_section(), "fisher": fisher_section()}
    return {**blocks, "overlap": overlap_section()}


if __name__ == "__main__":
    plot()
    compare.plot(load("demo_cpu"), RESULTS / "demo_cpu.png")
    write(ROOT / "README.md", {"speed": speed_section()})
    write(ROOT / "benchmarks" / "README.md", tables())
