"""Exact Fisher information against autograd, one example at a time, in float64; what it must refuse and leave alone."""

from __future__ import annotations

import copy

import models
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from childtune_kernels.fisher import Fisher, classification_loss, estimate_fisher, regression_loss
from childtune_kernels.fisher.batches import take
from childtune_kernels.fisher.exact import Captured

EXACT = 1e-12  # float64 sums of a few thousand terms
FLOOR = 1e-24  # of gradients that are 0 but for rounding: attention does not change with a key's bias


def one_by_one(model, batches, loss) -> dict[str, torch.Tensor]:
    """The definition: autograd on batches of one example."""
    named = dict(model.named_parameters())
    sums = {name: torch.zeros_like(p) for name, p in named.items()}
    for batch in batches:
        examples = len(batch["labels"])
        for j in range(examples):
            alone = loss(model, take(batch, [j], examples)).sum()
            grads = torch.autograd.grad(alone, list(named.values()), allow_unused=True)
            for name, grad in zip(named, grads, strict=True):
                if grad is not None:
                    sums[name] += grad.detach() ** 2
    return sums


def assert_same(fisher: Fisher, expected: dict[str, torch.Tensor]) -> None:
    assert set(fisher) == set(expected)
    for name, value in expected.items():
        error, size = float((fisher.sums[name] - value).norm()), float(value.norm())
        assert error <= EXACT * size + FLOOR, f"{name} ({fisher.notes.get(name)}): {error / size}"


def alone(fisher: Fisher) -> set[str]:
    return {name for name, note in fisher.notes.items() if note.startswith("one example at a time")}


@pytest.mark.parametrize("left_padding", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("name", models.NAMES)
def test_model(name, left_padding):
    model, loss = models.build(name), models.loss_of(name)
    batches = [models.batch(name, 3, 5, left_padding), models.batch(name, 2, 7, left_padding)]
    fisher = estimate_fisher(model, batches, loss)
    assert fisher.count == 5
    assert_same(fisher, one_by_one(model, batches, loss))
    assert {n.split(".")[-2] for n in alone(fisher)} <= {"relative_attention_bias"}
    if not name.startswith("xlnet"):
        assert "no gradient" not in fisher.notes.values()


class Odd(nn.Module):
    """Uses of parameters that peers get wrong or do not cover."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=0)
        self.position = nn.Parameter(torch.randn(5, 6))
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.twice = nn.Linear(6, 6)
        self.raw = nn.Parameter(torch.randn(6, 2, 3))
        self.turned = nn.Parameter(torch.randn(4, 6))
        self.heads = nn.Parameter(torch.randn(2, 3, 3))
        self.scale = nn.Parameter(torch.zeros(6))  # exact zeros: no way back from a norm's output
        self.norm = nn.RMSNorm(6)
        self.grouped = nn.Conv1d(6, 6, 3, groups=2)
        self.recurrent = nn.LSTM(6, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 3)
        self.unused = nn.Parameter(torch.randn(3))

    def forward(self, ids):
        x = self.embed(ids)
        x += self.position
        x = torch.cat([self.token.expand(len(ids), -1, -1), x], 1)
        x = self.twice(torch.tanh(self.twice(x)))
        parts = torch.einsum("bth,hnd->btnd", x, self.raw)
        x = x + torch.einsum("btnd,nde->btne", parts, self.heads).flatten(2)
        x = x.transpose(0, 1)  # sequence first from here
        x = self.norm(x * (1 + self.scale)) @ self.turned.t() @ self.turned
        x = self.recurrent(x)[0].transpose(0, 1)
        x = x + self.grouped(x.mT).mean(-1)[:, None]
        return self.head((x + self.attention(x, x, x)[0])[:, 0])


def odd_loss(model, batch):
    return F.cross_entropy(model(batch["ids"]), batch["labels"], reduction="none")


@pytest.fixture
def odd():
    model = Odd().double().eval()
    ids = torch.tensor([[1, 1, 1, 2, 0], [3, 4, 3, 0, 0], [5, 6, 7, 8, 9]])
    return model, [{"ids": ids, "labels": torch.tensor([0, 1, 2])}]


def test_odd_uses(odd):
    model, batches = odd
    fisher = estimate_fisher(model, batches, odd_loss)
    assert_same(fisher, one_by_one(model, batches, odd_loss))
    assert fisher.notes["unused"] == "no gradient"
    assert fisher.notes["twice.weight"] == "product"
    assert fisher.notes["raw"] == "product" and fisher.notes["heads"] == "einsum"
    assert {n.split(".")[0] for n in alone(fisher)} == {
        "position", "turned", "grouped", "recurrent", "attention", "scale",
    }  # fmt: skip
    assert "one example at a time" in fisher.report() and "twice.weight" in fisher.report()


def test_batches_do_not_matter(odd):
    model, ((whole),) = odd
    single = estimate_fisher(model, [whole], odd_loss)
    parts = estimate_fisher(model, [take(whole, [2], 3), take(whole, [1, 0], 3)], odd_loss)
    assert parts.count == single.count == 3
    assert_same(parts, single.sums)


def test_the_model_is_as_it_was(odd):
    model, batches = odd
    model.train()
    model.norm.eval()
    model.register_buffer("calls", torch.zeros(()))
    model.register_forward_pre_hook(lambda module, args: module.calls.add_(1) and None)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.head.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    fisher = estimate_fisher(model, batches, odd_loss, train_mode=True)
    assert "head.weight" not in fisher
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert modes == [module.training for module in model.modules()]
    assert attributes == {name: sorted(vars(module)) for name, module in model.named_modules()}
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()].count(False) == 1


def test_identity_of_the_batch_rule():
    """E_batch[(mean_j G_j)^2] is E_j[G_j^2] / B and cross terms: with one example a batch, nothing but the first."""
    model, loss = models.build("bert"), classification_loss
    whole = models.batch("bert", 4, 5)
    singles = [take(whole, [j], 4) for j in range(4)]
    exact = estimate_fisher(model, [whole], loss)
    assert_same(estimate_fisher(model, singles, loss, rule="batch"), exact.sums)
    params = list(model.parameters())
    grads = [torch.autograd.grad(loss(model, one).sum(), params, allow_unused=True) for one in singles]
    batch = estimate_fisher(model, [whole], loss, rule="batch")
    assert batch.count == 1
    for i, name in enumerate(batch):
        cross = sum(grads[a][i] * grads[b][i] for a in range(4) for b in range(4) if a != b)
        torch.testing.assert_close(batch.sums[name], (exact.sums[name] + cross) / 16, rtol=1e-9, atol=1e-20)


def test_released_rule_clips_each_tensor():
    model, batches = models.build("bert").eval(), [models.batch("bert", 3, 5)]
    kinds = dict(rule="released", train_mode=False)
    small = estimate_fisher(model, batches, classification_loss, max_grad_norm=1e-3, **kinds)
    norms = [float(value.sum()) ** 0.5 for value in small.sums.values()]
    assert max(norms) <= 1e-3 * (1 + 1e-6) and norms.count(max(norms)) < len(norms)
    large = estimate_fisher(model, batches, classification_loss, max_grad_norm=1e9, **kinds)
    assert_same(large, estimate_fisher(model, batches, classification_loss, rule="batch").sums)
    dropped = estimate_fisher(model, batches, classification_loss, rule="released", max_grad_norm=1e9)
    assert any(not torch.allclose(dropped.sums[n], large.sums[n]) for n in large)


@pytest.mark.parametrize("rule", ["batch", "released"])
def test_batch_rules_know_what_has_no_gradient(odd, rule):
    model, batches = odd
    notes = estimate_fisher(model, batches, odd_loss, rule=rule).notes
    assert notes == {name: "squared batch gradient" for name in notes} | {"unused": "no gradient"}
    assert list(estimate_fisher(model, batches, odd_loss, rule=rule, include=["head.bias"])) == ["head.bias"]


def test_scaling_the_loss_scales_the_information():
    model, batches = models.build("roberta"), [models.batch("roberta", 3, 5)]
    plain = estimate_fisher(model, batches, classification_loss)
    scaled = estimate_fisher(model, batches, lambda m, b: 4 * classification_loss(m, b))
    assert_same(scaled, {name: 16 * value for name, value in plain.sums.items()})


@pytest.mark.parametrize("name", models.NAMES)
def test_losses_are_the_models_own(name):
    """transformers takes the mean over what is predicted; a causal model predicts no first token."""
    model, loss, batch = models.build(name), models.loss_of(name), models.batch(name, 3, 5)
    for j, value in enumerate(loss(model, batch)):
        alone = take(batch, [j], 3)
        labels = alone["labels"][:, 1:] if name in ("gpt2", "llama") else alone["labels"]
        own = model(**alone).loss * (labels != -100).sum()
        torch.testing.assert_close(value, own.to(value.dtype), rtol=1e-5, atol=1e-6)  # some of them take it in float32


def test_labels():
    model, batch = models.build("bert"), models.batch("bert", 3, 5)
    predicted = estimate_fisher(model, [batch], classification_loss, labels="predicted")
    likeliest = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
    assert_same(predicted, estimate_fisher(model, [{**batch, "labels": likeliest}], classification_loss).sums)
    torch.manual_seed(1)
    sampled = [estimate_fisher(model, [batch] * 40, classification_loss, labels="sampled") for _ in range(2)]
    assert_same(sampled[0], sampled[1].sums)  # the random state is put back, so the second draws the same
    assert not torch.allclose(sampled[0].sums["classifier.bias"], 40 * predicted.sums["classifier.bias"])


def test_regression():
    model = models.build("bert")
    batch = models.batch("bert", 3, 5)
    model.classifier = nn.Linear(16, 1).double()
    given = {**batch, "labels": torch.tensor([0.5, -1.0, 2.0]).double()}
    model.num_labels = model.config.num_labels = 1
    torch.testing.assert_close(regression_loss(model, given).mean() * 2, model(**given).loss)
    fisher = estimate_fisher(model, [given], regression_loss)
    assert_same(fisher, one_by_one(model, [given], regression_loss))


def test_include_exclude_and_limit():
    model, batches = models.build("bert"), [models.batch("bert", 3, 5)] * 4
    names = ["classifier.weight", "bert.pooler.dense.bias"]
    fisher = estimate_fisher(model, iter(batches), classification_loss, include=names, limit=2)
    assert list(fisher) == names and fisher.count == 6
    assert "classifier.bias" not in estimate_fisher(model, batches, classification_loss, exclude=["classifier.bias"])


def test_float32_and_autocast_are_close_to_float64():
    model, batches = models.build("bert"), [models.batch("bert", 3, 5)]
    expected = one_by_one(model, batches, classification_loss)
    model.float()

    def autocast(m, b):
        with torch.autocast("cpu", torch.bfloat16):
            return classification_loss(m, b)

    total = torch.cat([v.flatten() for v in expected.values()])
    for loss, bound in ((classification_loss, 1e-5), (autocast, 0.05)):  # bf16: 2**-8 an operation, some ten deep
        fisher = estimate_fisher(model, batches, loss)
        assert all(value.dtype == torch.float32 for value in fisher.sums.values()) and not alone(fisher)
        got = torch.cat([fisher.sums[name].double().flatten() for name in expected])
        assert float((got - total).norm() / total.norm()) < bound


def test_disagreement_is_found_and_mended(monkeypatch):
    """The check of two examples catches a wrong rule: here, one that squares token by token."""
    from childtune_kernels.fisher import rules

    def per_token(self, total):
        d, x = self.operands()
        rules._product_(total, d.flatten(0, 1)[:, None], x.flatten(0, 1)[:, None], self.transposed)

    monkeypatch.setattr(rules.Product, "accumulate_", per_token)
    model, batches = models.build("bert"), [models.batch("bert", 3, 5)]
    fisher = estimate_fisher(model, batches, classification_loss)
    value = "bert.encoder.layer.0.attention.self.value.weight"
    assert value in alone(fisher)
    expected = one_by_one(model, batches, classification_loss)
    assert_same(Fisher({n: fisher.sums[n] for n in alone(fisher)}, 3), {n: expected[n] for n in alone(fisher)})
    unchecked = estimate_fisher(model, batches, classification_loss, check=False)
    assert not torch.allclose(unchecked.sums[value], fisher.sums[value])


def mean_loss(model, batch):
    return classification_loss(model, batch).mean()


def spread_mean(model, batch):
    return mean_loss(model, batch).expand(len(batch["labels"]))


def infinite(model, batch):
    return classification_loss(model, batch) / 0.0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"per_example_loss": mean_loss}, r"per_example_loss must be a function returning \[B\].*got \(\)"),
        ({"per_example_loss": spread_mean}, "losses depend on their own example only, got"),
        ({"per_example_loss": infinite}, "per_example_loss must be finite in every batch|own example only"),
        ({"per_example_loss": lambda m, b: classification_loss(m, b)[:1]}, "one loss for each|own example only"),
        ({"batches": []}, r"batches must be at least one batch, got \[\]"),
        ({"rule": "kfac"}, "rule must be one of .*exact.*, got 'kfac'"),
        ({"labels": "all"}, "labels must be one of .*sampled.*, got 'all'"),
        ({"limit": 0}, "limit must be a positive number"),
        ({"include": ["nothing"]}, r"include must be names of the model's parameters, got \['nothing'\]"),
        ({"exclude": ["nothing"]}, r"exclude must be names of the model's parameters, got \['nothing'\]"),
        ({"graph": True}, "graph must be False for a model on cpu, got True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals(changes, message):
    model = models.build("bert")
    given = dict(batches=[models.batch("bert", 3, 5)], per_example_loss=classification_loss) | changes
    with pytest.raises(ValueError, match=message):
        estimate_fisher(model, **given)


def test_refuses_what_nobody_trains(odd):
    model, batches = odd
    with pytest.raises(ValueError, match=r"include must be names of parameters that the losses depend on.*'unused'"):
        estimate_fisher(model, batches, odd_loss, include=["unused", "head.bias"])
    model.head.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"include must be parameters with requires_grad=True, got \['head.bias'\]"):
        estimate_fisher(model, batches, odd_loss, include=["head.bias"])
    with pytest.raises(ValueError, match="a model with parameters to estimate"):
        estimate_fisher(model.requires_grad_(False), batches, odd_loss)


def test_refuses_batch_norm_in_training():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    batches = [{"x": torch.randn(5, 4).double(), "labels": torch.tensor([0, 1, 2, 0, 1])}]

    def loss(m, b):
        return F.cross_entropy(m(b["x"]), b["labels"], reduction="none")

    with pytest.raises(ValueError, match=r"train_mode must be False for a model with batch norm.*\['1'\]"):
        estimate_fisher(model, batches, loss, train_mode=True)
    assert_same(estimate_fisher(model.eval(), batches, loss), one_by_one(model, batches, loss))


def test_save_and_load(tmp_path):
    model, batches = models.build("bert"), [models.batch("bert", 3, 5)]
    fisher = estimate_fisher(model, batches, classification_loss)
    fisher.save(tmp_path / "fisher.safetensors")
    loaded = Fisher.load(tmp_path / "fisher.safetensors")
    assert list(loaded) == list(fisher) and loaded.count == 3 and loaded.report() == fisher.report()
    assert all(torch.equal(loaded[name], fisher[name]) for name in fisher)
    assert loaded.top(0.1) == fisher.top(0.1)
    with pytest.raises(ValueError, match="must hold childtune_kernels.Fisher version 1"):
        fisher.top(0.1).save(tmp_path / "mask.safetensors")
        Fisher.load(tmp_path / "mask.safetensors")


def test_children():
    model, batches = models.build("bert"), [models.batch("bert", 3, 5)]
    fisher = estimate_fisher(model, batches, classification_loss)
    mask = fisher.top(0.2)
    assert all(name.startswith("bert.") for name in mask) and "classifier.weight" not in mask
    weights = sum(fisher.sums[name].numel() for name in mask)
    assert mask.count() == round(0.2 * weights)
    scores = torch.cat([fisher.sums[name].flatten() for name in mask])
    chosen = torch.cat([mask.to_dense(name).flatten() for name in mask])
    assert scores[chosen].min() >= scores[~chosen].max()
    assert not (fisher.bottom(0.2) & mask).count()
    assert set(fisher.top(0.2, scope="released")) == {n for n in fisher if "layer" in n}
    assert set(fisher.top(0.2, scope="all")) == set(fisher)
    assert set(fisher.top(0.2, scope=["classifier.weight"])) == {"classifier.weight"}
    with pytest.raises(ValueError, match="scope must be one of"):
        fisher.top(0.2, scope="layers")
    with pytest.raises(ValueError, match="scope must name parameters"):
        fisher.top(0.2, scope=["layers"])
    with pytest.raises(ValueError, match="scope must hold at least one"):
        fisher.top(0.2, scope=lambda name: False)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bert", "gpt2", "xlnet-types"])
def test_on_a_gpu(name):
    model, loss = models.build(name), models.loss_of(name)
    batches = [models.batch(name, 3, 5), models.batch(name, 2, 7)]
    expected = one_by_one(model, batches, loss)
    fisher = estimate_fisher(model.float().cuda(), batches, loss)
    assert not alone(fisher)
    size = max(float(value.norm()) for value in expected.values())
    for label, value in expected.items():
        error = float((fisher.sums[label].double().cpu() - value).norm())
        assert error <= 1e-4 * float(value.norm()) + 1e-10 * size, label  # float32, some ten operations deep


@pytest.mark.gpu
def test_captured_pass_adds_what_the_eager_one_does():
    model, loss = models.build("bert").float().cuda(), classification_loss
    batches = [{k: v.cuda() for k, v in models.batch("bert", 3, 5 + i // 3).items()} for i in range(4)]
    batches = [{k: v for k, v in b.items() if k != "attention_mask"} for b in batches]
    eager = estimate_fisher(model, batches, loss)
    captured = estimate_fisher(model, batches, loss, graph=True)  # the last batch has another shape
    assert captured.count == eager.count == 12
    for name in eager:
        torch.testing.assert_close(captured.sums[name], eager.sums[name], rtol=1e-4, atol=1e-9)
    weights = [{**batches[0], "weight": torch.full((3,), value, device="cuda")} for value in (1.0, 1.0, torch.inf)]

    def weighted(m, b):
        return loss(m, {k: v for k, v in b.items() if k != "weight"}) * b["weight"]

    with pytest.raises(ValueError, match=r"finite in every batch, got .*batches \[2\]"):
        estimate_fisher(model, weights, weighted, graph=True)


@pytest.mark.parametrize("check", [True, False])
def test_an_option_without_a_rule_leaves_the_parameter_to_single_examples(check):
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(3, dtype=torch.float64))

        def forward(self, x):
            return torch.add(x, self.shift, alpha=2).square().sum(1)

    x = torch.arange(6.0, dtype=torch.float64).view(2, 3)
    fisher = estimate_fisher(Shifted(), [x], lambda model, batch: model(batch), check=check)
    torch.testing.assert_close(fisher.sums["shift"].double(), (4 * x).square().sum(0))  # d/ds (x + 2 s)**2 = 4 x
    assert "shift" in alone(fisher)


def test_einsum_with_a_list_of_operands():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.turned = (nn.Parameter(torch.randn(3, 4, dtype=torch.float64)) for _ in range(2))

        def forward(self, x):
            return torch.einsum("bd,dh->bh", [x, self.weight]) @ torch.einsum("dh->hd", [self.turned])

    def loss(model, batch):
        return model(batch["x"]).square().sum(1)

    model, batch = Listed(), {"x": torch.randn(3, 3, dtype=torch.float64), "labels": torch.zeros(3)}
    fisher = estimate_fisher(model, [batch], loss)
    assert_same(fisher, one_by_one(model, [batch], loss))
    assert fisher.notes["weight"] == "product" and alone(fisher) == {"turned"}


def test_a_capture_is_for_batches_of_its_shapes_and_dtypes():
    """Without a GPU: what a captured pass would replay, and what it leaves to an ordinary one."""
    captured, batch = object.__new__(Captured), {"x": torch.zeros(3, 4), "labels": torch.zeros(3, dtype=torch.long)}
    captured.batch, captured.usable = batch, True
    assert captured.fits({"x": torch.ones(3, 4), "labels": torch.ones(3, dtype=torch.long)})
    for other in ({**batch, "x": torch.zeros(3, 5)}, {**batch, "x": torch.zeros(3, 4).half()}, {"x": batch["x"]}):
        assert not captured.fits(other)
    captured.usable = False
    assert not captured.fits(batch)
