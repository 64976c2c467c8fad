"""Experiments: the splits of the task, what a seed and a method decide, which child D takes, and what is concluded."""

import warnings

import pytest
import torch

from childtune_kernels.experiments import compare, training
from childtune_kernels.experiments.digits import Protocol, VisionTransformer, load_task

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = Protocol(pretrain_steps=5, steps=5, learning_rates=(1e-3, 1e-2), tuning_seeds=1, evaluations=2)


@pytest.fixture(scope="module")
def task():
    return load_task(QUICK, torch.device("cpu"))


def test_splits_share_no_image(task):
    assert [len(split.labels) for split in task] == [901, 296, 200, 400]
    images = torch.cat([split.pixels for split in task]).flatten(1)
    assert len(images.unique(dim=0)) == len(images)


def test_a_seed_gives_every_method_the_same_start(task, monkeypatch):
    seen = []

    def look(model, optimizer, images, *rest):
        seen.append([*(p.detach().clone() for p in model.parameters()), images.pixels])
        return 0.0

    monkeypatch.setattr(training, "train", look)
    model = VisionTransformer()
    for method, seed in (("vanilla", 3), ("F", 3), ("D", 3), ("vanilla", 4)):
        training.fine_tune(method, model, task, QUICK, 1e-3, seed, task.validation, 1, lambda: None)
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
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # the demo's reader is told nothing that is meant to be so
        mask = training.child_of(model, images, 0.3)
    assert set(mask) == set(expected)
    assert mask.count() == round(0.3 * sum(f.numel() for f in expected.values()))
    inside = min(f[mask.to_dense(n)].min() for n, f in expected.items() if mask.count(n))
    outside = max(f[~mask.to_dense(n)].max() for n, f in expected.items() if mask.density(n) < 1)
    assert inside >= outside * (1 - 1e-5)  # sums of 7 terms in another order of accumulation


def test_child_takes_the_earlier_of_equal_weights(task):
    model = VisionTransformer(width=8, depth=1)
    torch.nn.init.zeros_(model.head.weight)  # no gradient reaches the layers: every score is 0
    with pytest.warns(UserWarning, match="no information at all"):
        mask = training.child_of(model, task.pool[torch.arange(2)], 0.3)
    chosen = torch.cat([mask.to_dense(name).flatten() for name in mask])
    assert chosen[: mask.count()].all()


def test_only_the_child_and_what_the_mask_leaves_out_move(task):
    torch.manual_seed(0)
    model, images = VisionTransformer(width=8, depth=1), task.pool[torch.arange(20)]
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer, _ = training.make_optimizer("D", model, images, 1e-2, 0, 0.3)
    training.train(model, optimizer, images, 3, 8, 0, lambda step: None)
    for name, param in model.named_parameters():
        moved = param != before[name]
        if name in optimizer.mask:
            assert not moved[~optimizer.mask.to_dense(name)].any()
        else:
            assert moved.any(), name


def test_an_experiment_repeats_itself(task):
    first, second = (compare.experiment(("F", "D"), 1, task, QUICK)["methods"] for _ in range(2))
    for method in ("F", "D"):
        assert first[method]["curves"] == second[method]["curves"]
        assert first[method]["validation"] == second[method]["validation"]


def test_test_images_choose_nothing(task):
    wrong = task._replace(test=task.test._replace(labels=(task.test.labels + 1) % 5))
    right, other = (compare.experiment(("vanilla",), 1, t, QUICK)["methods"]["vanilla"] for t in (task, wrong))
    assert (right["lr"], right["validation"]) == (other["lr"], other["validation"])
    assert right["accuracy"] != other["accuracy"]


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([1.0, 1.2, 0.8], "above vanilla here"),
        ([-1.0, -1.2, -0.8], "below vanilla here"),
        ([3.0, -1.0, 2.0], "no difference from vanilla is shown"),  # mean 1.3, standard error 1.2
    ],
)
def test_verdict_weighs_the_mean_against_its_spread(differences, expected):
    assert compare.verdict(differences).startswith(expected)
