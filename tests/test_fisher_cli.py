"""`childtune fisher`: from a checkpoint folder and a task file to a mask file."""

from __future__ import annotations

import json

import pytest
import torch

from childtune_kernels import ChildMask, Fisher, estimate_fisher
from childtune_kernels.cli import fisher as command
from childtune_kernels.cli import main
from childtune_kernels.fisher import classification_loss

transformers = pytest.importorskip("transformers")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "the", "not"]


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def task(tmp_path):
    rows = [("a good film", 1), ("not good", 0), ("the film", 1), ("bad", 0), ("a bad film not good", 0)]
    path = tmp_path / "task.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in rows))
    return path


def test_mask_is_that_of_the_library(checkpoint, task, tmp_path, capsys):
    out, saved = tmp_path / "mask.safetensors", tmp_path / "fisher.safetensors"
    options = ["--out", str(out), "--p", "0.3", "--batch-size", "2", "--device", "cpu", "--report"]
    assert main(["fisher", str(checkpoint), str(task), *options, "--save-fisher", str(saved)]) == 0
    printed = capsys.readouterr().out
    assert "bert.encoder.layer.0.attention.self.query.weight" in printed and "5 examples" in printed
    mask, rows = ChildMask.load(out), command.read_task(task)
    tokenizer, model = command.load(checkpoint, "classification", rows, "cpu")
    again = estimate_fisher(model, command.batches(rows, tokenizer, "classification", 5, 128), classification_loss)
    assert mask.digest() in printed and Fisher.load(saved).count == again.count == 5
    loaded = Fisher.load(saved)
    for name in again:
        torch.testing.assert_close(loaded[name], again[name], rtol=1e-4, atol=1e-10)
    assert mask == loaded.top(0.3) and mask.jaccard(again.top(0.3)) > 0.95
    assert all(name.startswith("bert.") for name in mask)


def test_lowest_and_scope(checkpoint, task, tmp_path):
    out = tmp_path / "low.safetensors"
    assert main(["fisher", str(checkpoint), str(task), "--out", str(out), "--lowest", "--scope", "released",
                 "--rule", "batch", "--device", "cpu", "--limit", "1"]) == 0  # fmt: skip
    assert all("layer" in name for name in ChildMask.load(out))


def test_head_follows_the_labels(checkpoint, tmp_path):
    assert command._head_of([{"text": "a"}]) == "causal-lm"
    assert command._head_of([{"text": "a", "label": 1}, {"text": "b", "label": 0.5}]) == "regression"
    task, out = tmp_path / "task.jsonl", tmp_path / "mask.safetensors"
    task.write_text('{"text": "good", "label": 0.9}\n\n{"text": "bad", "text_pair": "film", "label": 0.1}\n')
    assert main(["fisher", str(checkpoint), str(task), "--out", str(out), "--device", "cpu"]) == 0


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "must hold at least one example"),
        ("text", "line 1 must be a JSON object"),
        ('{"label": 1}', 'line 1 must be a JSON object with a "text"'),
        ('{"text": "a", "label": 1}\n{"text": "b"}', "line 2 must have a label like the first line"),
        ('{"text": "a", "label": -1}', "labels must be class numbers from 0 on, got -1"),
    ],
    ids=["empty", "no-json", "no-text", "mixed", "negative"],
)
def test_refusals(content, message, checkpoint, tmp_path, capsys):
    task = tmp_path / "task.jsonl"
    task.write_text(content)
    assert main(["fisher", str(checkpoint), str(task), "--out", str(tmp_path / "m.safetensors")]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "m.safetensors").exists()


def test_refuses_a_folder_without_a_model_and_a_share_out_of_range(checkpoint, task, tmp_path, capsys):
    out = ["--out", str(tmp_path / "m.safetensors"), "--device", "cpu"]
    assert main(["fisher", str(tmp_path), str(task), *out]) == 1
    assert "checkpoint must be a folder with a config.json" in capsys.readouterr().err
    assert main(["fisher", str(checkpoint), str(task), *out, "--p", "1.5"]) == 1
    assert "p must be" in capsys.readouterr().err
