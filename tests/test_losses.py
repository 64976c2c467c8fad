"""The losses of Hugging Face heads against loops in float64; what they ignore, warn of and refuse."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from childtune_kernels.cli import main
from childtune_kernels.fisher import (
    Fisher,
    causal_lm_loss,
    classification_loss,
    estimate_fisher,
    regression_loss,
    token_loss,
)

CLASSES = 7
CHOICES = ("true", "sampled", "predicted")


class Tokens(nn.Module):
    """Logits [B, T, classes] of token ids, or [B, outputs] of the first token."""

    config = SimpleNamespace(is_encoder_decoder=False)

    def __init__(self, outputs: int = CLASSES, pooled: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(CLASSES, 5)
        self.out = nn.Linear(5, outputs)
        self.pooled = pooled
        self.double()

    def forward(self, input_ids, attention_mask=None):
        logits = self.out(torch.tanh(self.embed(input_ids)))
        return SimpleNamespace(logits=logits[:, 0] if self.pooled else logits)


class Fixed:
    """A model that answers with given logits."""

    def __init__(self, model: Tokens, logits: torch.Tensor):
        self.logits, self.config, self.parameters = logits, model.config, model.parameters

    def __call__(self, **inputs):
        return SimpleNamespace(logits=self.logits)


def ragged() -> dict[str, torch.Tensor]:
    """Lengths 6, 3 and 1 of 6, and -100 in the middle too; padding has ids that would count if they were labels."""
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [6, 5, 4, 2, 2, 2], [3, 1, 1, 1, 1, 1]])
    attention = torch.tensor([[1] * 6, [1] * 3 + [0] * 3, [1] + [0] * 5])
    labels = ids.masked_fill(attention == 0, -100)
    labels[0, 2] = labels[0, 3] = labels[1, 1] = -100
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


def by_hand(logits: torch.Tensor, labels: torch.Tensor, shift: int) -> list[float]:
    sums = []
    for j, row in enumerate(labels.tolist()):
        terms = [
            torch.logsumexp(logits[j, t - shift], 0) - logits[j, t - shift, label]
            for t, label in enumerate(row)
            if t >= shift and label != -100
        ]
        sums.append(float(sum(terms)))
    return sums


@pytest.mark.parametrize("loss, shift", [(causal_lm_loss, 1), (token_loss, 0)], ids=["causal", "token"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
def test_ignored_positions_have_no_loss(loss, shift, dtype):
    model, batch = Tokens(), ragged()
    logits = model(batch["input_ids"]).logits.detach()
    got = loss(model, batch | {"labels": batch["labels"].to(dtype)})
    expected = by_hand(logits, batch["labels"], shift)
    torch.testing.assert_close(got.tolist(), expected, rtol=1e-12, atol=0)
    assert loss is token_loss or expected[2] == 0  # one token predicts nothing


@pytest.mark.parametrize("loss, shift", [(causal_lm_loss, 1), (token_loss, 0)], ids=["causal", "token"])
@pytest.mark.parametrize("choice", ["sampled", "predicted"])
def test_chosen_labels_keep_what_is_ignored(loss, shift, choice):
    model, batch = Tokens(), ragged()
    logits = model(batch["input_ids"]).logits.detach()
    scored = logits[:, : logits.shape[1] - shift]
    torch.manual_seed(3)
    got = loss(model, batch, labels=choice)
    torch.manual_seed(3)
    drawn = torch.multinomial(scored.softmax(-1).flatten(0, 1), 1).view(scored.shape[:2])
    chosen = drawn if choice == "sampled" else scored.argmax(-1)
    labels = batch["labels"].clone()
    labels[:, shift:] = chosen.masked_fill(batch["labels"][:, shift:] == -100, -100)
    torch.testing.assert_close(got.tolist(), by_hand(logits, labels, shift), rtol=1e-12, atol=0)


@pytest.mark.parametrize("choice", CHOICES)
def test_information_of_ignored_positions_is_none(choice):
    """What stands in the padding changes no weight's information."""
    model, batch = Tokens(), ragged()
    other = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 0)}
    torch.manual_seed(5)
    fishers = [estimate_fisher(model, [b], causal_lm_loss, labels=choice, check=False) for b in (batch, other)]
    for name in fishers[0]:
        torch.testing.assert_close(fishers[0].sums[name], fishers[1].sums[name], rtol=1e-12, atol=1e-18)
    assert float(fishers[0].sums["out.weight"].sum()) > 0


def test_padding_that_counts_is_warned_of():
    model, batch = Tokens(), ragged()
    careless = {**batch, "labels": batch["input_ids"].clone()}
    for loss in (causal_lm_loss, token_loss):
        with pytest.warns(UserWarning, match="set the labels of padding to -100"):
            loss(model, careless)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss(model, batch)
            loss(model, {key: value for key, value in careless.items() if key != "attention_mask"})
    first = {**batch, "labels": batch["labels"].clone(), "attention_mask": batch["attention_mask"].clone()}
    first["attention_mask"][0, 0] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        causal_lm_loss(model, first)  # nothing predicts the first token
    with pytest.warns(UserWarning, match="set the labels of padding to -100"):
        token_loss(model, first)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.uint8])
def test_classification_by_hand(dtype):
    model, batch = Tokens(200, pooled=True), ragged()
    classes = {torch.uint8: [3, 156, 199], torch.int8: [3, -100, 127]}.get(dtype, [199, -100, 0])
    logits = model(batch["input_ids"]).logits.detach()
    rows = zip(logits, classes, strict=True)
    expected = [0.0 if k == -100 else float(torch.logsumexp(row, 0) - row[k]) for row, k in rows]
    got = classification_loss(model, batch | {"labels": torch.tensor(classes, dtype=dtype)})
    torch.testing.assert_close(got.tolist(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.tensor([[0], [1], [2]]), r"labels must be \[3\], as the logits, got \[3, 1\]"),
        (torch.tensor([0, 1]), r"labels must be \[3\], as the logits, got \[2\]"),
        (torch.tensor([0.0, 1.0, 2.0]), "labels must be integers, the numbers of classes, got 'torch.float32'"),
        (torch.tensor([True, False, True]), "labels must be integers, the numbers of classes, got 'torch.bool'"),
        (torch.eye(3, 4), r"labels must be \[3\], as the logits, got \[3, 4\]"),
        (torch.tensor([0, 4, 1]), r"labels must be from 0 to 3, or -100 for no label, got \[4\]"),
        (torch.tensor([-1, 0, 1]), r"labels must be from 0 to 3, or -100 for no label, got \[-1\]"),
        ([0, 1, 2], "labels must be a tensor, got 'list'"),
    ],
    ids=["column", "short", "float", "bool", "shares", "high", "low", "list"],
)
def test_classification_refuses(labels, message):
    with pytest.raises(ValueError, match=message):
        classification_loss(Tokens(4, pooled=True), ragged() | {"labels": labels})


@pytest.mark.parametrize("loss", [causal_lm_loss, token_loss])
def test_token_losses_refuse(loss):
    model, batch = Tokens(), ragged()
    wrong = batch["labels"].clone()
    wrong[0, 4], wrong[1, 2] = CLASSES, -5
    for labels, message in (
        (wrong, rf"labels must be from 0 to 6, or -100 for no label, got \[{CLASSES}, -5\]"),
        (batch["labels"][:, :4], r"labels must be \[3, 6\], as the logits, got \[3, 4\]"),
        (batch["labels"][:, 0], r"labels must be \[3, 6\], as the logits, got \[3\]"),
        (batch["labels"].float(), "labels must be integers"),
    ):
        with pytest.raises(ValueError, match=message):
            loss(model, batch | {"labels": labels})
    assert loss(model, batch | {"labels": wrong}, labels="predicted").isfinite().all()  # these are not asked
    with pytest.raises(ValueError, match=r"logits must be \[B, T, .*got \[3, 7\]"):
        loss(Tokens(pooled=True), batch)


def test_regression_refuses():
    model, batch = Tokens(1, pooled=True), ragged()
    numbers = torch.tensor([0.5, -1.0, 2.0])
    expected = (model(batch["input_ids"]).logits.flatten() - numbers.double()).square() / 2
    for labels in (numbers, numbers[:, None], numbers.half()):
        torch.testing.assert_close(regression_loss(model, batch | {"labels": labels}), expected)
    for labels in (numbers[:1], numbers[0], numbers.expand(3, 3)):
        with pytest.raises(ValueError, match=r"labels must be \[3\], numbers, got "):
            regression_loss(model, batch | {"labels": labels})
    with pytest.raises(ValueError, match=r"logits must be \[B\] or \[B, 1\].*got \[3, 2\]"):
        regression_loss(Tokens(2, pooled=True), batch | {"labels": numbers})


def test_a_regressions_labels_are_drawn_around_the_prediction():
    """From a normal distribution of variance 1, that is: what remains is the noise, and so is the gradient."""
    model, batch = Tokens(1, pooled=True), ragged()
    torch.manual_seed(7)
    losses = regression_loss(model, batch, labels="sampled")
    torch.manual_seed(7)
    noise = torch.randn(3, dtype=torch.float64)
    torch.testing.assert_close(losses, noise.square() / 2)
    (slope,) = torch.autograd.grad(losses.sum(), [model.out.bias])
    torch.testing.assert_close(slope, -noise.sum()[None])


@pytest.mark.parametrize("loss", [classification_loss, causal_lm_loss, token_loss, regression_loss])
def test_unknown_choice_is_refused(loss):
    with pytest.raises(ValueError, match="labels must be one of .*sampled.*, got 'drawn'"):
        loss(Tokens(), ragged(), labels="drawn")
    with pytest.raises(ValueError, match="batch must be a mapping that holds 'labels', got list"):
        loss(Tokens(), [ragged()])


@pytest.mark.parametrize("loss", [classification_loss, causal_lm_loss, token_loss, regression_loss])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_losses_are_at_least_float32(loss, dtype):
    """Taken of the logits as they are, widened first: not the 16-bit loss of 16-bit logits."""
    pooled = loss in (classification_loss, regression_loss)
    model, batch = Tokens(1 if loss is regression_loss else CLASSES, pooled).to(dtype), ragged()
    labels = {classification_loss: torch.tensor([0, 3, 6]), regression_loss: torch.tensor([0.1, 0.2, 0.3])}
    batch["labels"] = labels.get(loss, batch["labels"])
    got = loss(model, batch)
    logits = model(batch["input_ids"]).logits.detach()
    expected = loss(Fixed(model, logits.double()), batch)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_labels_out_of_range_on_a_gpu_are_nan_without_an_assertion():
    batch = {key: value.cuda() for key, value in ragged().items()}
    batch["labels"][1, 2] = CLASSES
    assert causal_lm_loss(Tokens().cuda(), batch).isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match=r"finite in every batch, got 'NaN or infinity in batches \[0\]"):
        estimate_fisher(Tokens().cuda(), [batch], causal_lm_loss, check=False)


@pytest.mark.parametrize("rule", ["exact", "batch", "released"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("place", [(0, 2), (1, 0), (1, 1)], ids=str)
def test_one_loss_that_is_not_finite_among_others(rule, value, place):
    batches = [{**ragged(), "extra": torch.zeros(3)} for _ in range(3)]
    batches[place[0]]["extra"][place[1]] = value

    def loss(model, batch):
        return causal_lm_loss(model, {k: v for k, v in batch.items() if k != "extra"}) + batch["extra"]

    with pytest.raises(ValueError, match=rf"finite in every batch, got 'NaN or infinity in batches \[{place[0]}\]'"):
        estimate_fisher(Tokens(), batches, loss, rule=rule)


def test_the_command_counts_no_padding(tmp_path):
    """Texts of several lengths in one batch have the information that they have one by one."""
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "the", "not"]
    folder, task = tmp_path / "model", tmp_path / "task.jsonl"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, pad_token_id=0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    texts = ("a good film", "bad", "the film the film not good")
    task.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    sums = []
    for size in (1, 3):
        out, saved = tmp_path / f"mask{size}.safetensors", tmp_path / f"fisher{size}.safetensors"
        options = ["--head", "causal-lm", "--batch-size", str(size), "--device", "cpu", "--save-fisher", str(saved)]
        assert main(["fisher", str(folder), str(task), "--out", str(out), *options]) == 0
        sums.append(Fisher.load(saved).sums)
    for name, value in sums[0].items():
        assert float((sums[1][name] - value).norm()) <= 1e-4 * float(value.norm()) + 1e-9, name  # float32, ten deep
