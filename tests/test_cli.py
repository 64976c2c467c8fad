"""The `childtune` command: the demo end to end on a tiny budget, the doctor, and what bad flags are told."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from childtune_kernels import ops
from childtune_kernels.cli import demo, doctor, main
from childtune_kernels.experiments import digits
from childtune_kernels.experiments.digits import METHODS, Protocol, VisionTransformer, child_network, load_task

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
QUICK = Protocol(pretrain_steps=5, steps=5, learning_rates=(1e-3, 1e-2), tuning_seeds=1, evaluations=2)


@pytest.fixture(scope="module")
def task():
    return load_task(QUICK, CPU)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(demo, "PROTOCOL", QUICK)


# ---- demo -----------------------------------------------------------------------------------------------------------


def test_demo_prints_one_table_and_writes_its_files(quick, tmp_path, capsys):
    numbers, picture = tmp_path / "demo.json", tmp_path / "demo.png"
    assert main(["demo", "--seeds", "2", "--device", "cpu", "--json", str(numbers), "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    results = json.loads(numbers.read_text())
    rows = [line for line in out.splitlines() if line.startswith("|")][2:]
    assert [row.split("|")[1].strip() for row in rows] == list(METHODS.values())
    for row, scores in zip(rows, results["methods"].values(), strict=True):
        assert len(scores["accuracy"]) == 2
        assert [curve[-1] for curve in scores["curves"]] == scores["accuracy"]
        assert f"| {sum(scores['accuracy']) / 2:.1f} ± " in row
        assert scores["lr"] == float(max(scores["validation"], key=scores["validation"].get))
    assert "the best of 0.001, 0.01 on 200 validation images" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_demo_repeats_itself(task):
    first, second = (demo.experiment(("F", "D"), 1, task, QUICK)["methods"] for _ in range(2))
    for method in ("F", "D"):
        assert first[method]["curves"] == second[method]["curves"]
        assert first[method]["validation"] == second[method]["validation"]


def test_demo_of_one_method_compares_nothing(quick, capsys):
    assert main(["demo", "--seeds", "1", "--methods", "F", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "Child-Tuning_F" in out and "vanilla AdamW" not in out and "Child-Tuning_D" not in out
    assert "nothing follows" in out


def test_methods_are_named_as_people_type_them():
    assert demo._methods("D") == ("D",) and demo._methods("Vanilla, f,d ") == ("vanilla", "F", "D")


def test_test_images_choose_nothing(task):
    wrong = task._replace(test=task.test._replace(labels=(task.test.labels + 1) % 5))
    right, other = (demo.experiment(("vanilla",), 1, t, QUICK)["methods"]["vanilla"] for t in (task, wrong))
    assert (right["lr"], right["validation"]) == (other["lr"], other["validation"])
    assert right["accuracy"] != other["accuracy"]


def test_splits_share_no_image(task):
    assert [len(split.labels) for split in task] == [901, 296, 200, 400]
    images = torch.cat([split.pixels for split in task]).flatten(1)
    assert len(images.unique(dim=0)) == len(images)


def test_a_seed_gives_every_method_the_same_start(task, monkeypatch):
    seen = []

    def look(model, optimizer, images, *rest):
        seen.append([*(p.detach().clone() for p in model.parameters()), images.pixels])
        return 0.0

    monkeypatch.setattr(digits, "train", look)
    model = VisionTransformer()
    for method, seed in (("vanilla", 3), ("F", 3), ("D", 3), ("vanilla", 4)):
        digits.fine_tune(method, model, task, QUICK, 1e-3, seed, task.validation, 1, lambda: None)
    vanilla, f, d, other = seen
    for start in (f, d):
        assert all(map(torch.equal, vanilla, start))
    assert not torch.equal(vanilla[-1], other[-1])


def test_child_is_the_share_with_the_highest_fisher(task):
    torch.manual_seed(0)
    model, images = VisionTransformer(width=8, depth=2), task.pool[torch.arange(7)]
    expected = dict.fromkeys((n for n, _ in model.named_parameters() if n.startswith("layers.")), 0)
    for pixels, label in zip(images.pixels, images.labels, strict=True):  # Eq. 10, one example at a time
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(pixels[None]), label[None]).backward()
        expected = {n: f + model.get_parameter(n).grad ** 2 / 7 for n, f in expected.items()}
    mask = child_network(model, images, 0.3)
    assert set(mask) == set(expected)
    assert mask.count() == round(0.3 * sum(f.numel() for f in expected.values()))
    inside = min(f[mask.to_dense(n)].min() for n, f in expected.items() if mask.count(n))
    outside = max(f[~mask.to_dense(n)].max() for n, f in expected.items() if mask.density(n) < 1)
    assert inside >= outside * (1 - 1e-5)  # sums of 7 terms in another order of accumulation


def test_child_takes_the_earlier_of_equal_weights(task):
    model = VisionTransformer(width=8, depth=1)
    torch.nn.init.zeros_(model.head.weight)  # no gradient reaches the layers: every score is 0
    mask = child_network(model, task.pool[torch.arange(2)], 0.3)
    chosen = torch.cat([mask.to_dense(name).flatten() for name in mask])
    assert chosen[: mask.count()].all()


def test_only_the_child_and_what_the_mask_leaves_out_move(task):
    torch.manual_seed(0)
    model, images = VisionTransformer(width=8, depth=1), task.pool[torch.arange(20)]
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer, _ = digits.make_optimizer("D", model, images, 1e-2, 0, 0.3)
    digits.train(model, optimizer, images, 3, 8, 0, lambda step: None)
    for name, param in model.named_parameters():
        moved = param != before[name]
        if name in optimizer.mask:
            assert not moved[~optimizer.mask.to_dense(name)].any()
        else:
            assert moved.any(), name


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([1.0, 1.2, 0.8], "above vanilla here"),
        ([-1.0, -1.2, -0.8], "below vanilla here"),
        ([3.0, -1.0, 2.0], "no difference from vanilla is shown"),  # mean 1.3, standard error 1.2
    ],
)
def test_verdict_weighs_the_mean_against_its_spread(differences, expected):
    assert demo._verdict(differences).startswith(expected)


def test_demo_names_missing_packages(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["demo"]) == 1
    assert "sklearn, scipy, tqdm: pip install 'childtune_kernels[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "0"], "--seeds: expected a whole number of at least 1, got '0'"),
        (["--seeds", "2.5"], "--seeds: expected a whole number of at least 1, got '2.5'"),
        (["--methods", "vanilla,E"], "--methods: expected some of vanilla,F,D, each once, got 'vanilla,E'"),
        (["--methods", "F,F"], "--methods: expected some of vanilla,F,D, each once, got 'F,F'"),
        (["--methods", ""], "--methods: expected some of vanilla,F,D, each once, got ''"),
        (["--device", "tpu"], "--device: expected auto, cpu or cuda, got 'tpu'"),
        (["--plot", "curves.txt"], "--plot: expected a .png file in a folder that exists, got 'curves.txt'"),
        (["--json", "no/such/folder/x.json"], "--json: expected a .json file in a folder that exists"),
    ],
)
def test_demo_says_what_a_flag_expects(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", *flags])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_demo_refuses_an_absent_gpu(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--device", "cuda"])
    assert "torch sees no CUDA device" in capsys.readouterr().err


# ---- doctor and the command itself ----------------------------------------------------------------------------------


def test_doctor_is_content(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith("bit for bit against the reference: OK")
    chosen = ops.implementation("auto", "cpu").NAME
    assert [line.split()[:2] for line in out.splitlines() if line.endswith("<- auto")][0] == ["cpu", chosen]
    for impl in ops.IMPLEMENTATIONS:
        reason = ops.unavailable(impl, "cpu")
        assert any(line.startswith(f"cpu   {impl}") and (reason or "yes") in line for line in out.splitlines())


@pytest.mark.parametrize("broken", ["one bit", "an exception"])
def test_doctor_finds_a_broken_implementation(broken, monkeypatch, capsys):
    trained, calls = doctor._trained, []

    def damaged(method, impl, device_type):
        calls.append(impl)
        result = trained(method, impl, device_type)
        if method == "D" and len(calls) % 2 == 0:  # the second of each pair is the one under test
            if broken == "an exception":
                raise RuntimeError("no kernel image")
            result["matrix"].view(-1)[-1:].view(torch.int32).bitwise_xor_(1)
        return result

    monkeypatch.setattr(doctor, "_trained", damaged)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "FAILED: D: " + ("RuntimeError: no kernel image" if broken == "an exception" else "matrix differ") in out
    assert out.rstrip().endswith("FAILED")


def test_a_command_imports_only_what_it_needs():
    code = (
        "import sys; from childtune_kernels.cli import main; main(['doctor']);"
        "heavy = {'sklearn', 'scipy', 'matplotlib', 'childtune_kernels.cli.demo', 'childtune_kernels.cli.bench'};"
        "loaded = heavy & sys.modules.keys(); sys.exit(str(loaded) if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_command_and_no_such_command(capsys):
    for argv in ([], ["dmeo"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
    assert "demo" in capsys.readouterr().err


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "childtune_kernels", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()[0]) == (0, "childtune_kernels")
