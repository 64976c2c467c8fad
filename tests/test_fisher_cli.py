"""`childtune fisher`: from a checkpoint folder and a task file to a mask file."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile

import pytest
import torch

from childtune_kernels import ChildMask, Fisher, estimate_fisher
from childtune_kernels.cli import fisher as command
from childtune_kernels.cli import main
from childtune_kernels.fisher import classification_loss

transformers = pytest.importorskip("transformers")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "the", "not"]


def make_checkpoint(folder, kind="BertForSequenceClassification", **options):
    """Save a tiny BERT of one layer, with its tokenizer."""
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12)
    config = transformers.BertConfig(vocab_size=len(WORDS), **sizes, **options)
    getattr(transformers, kind)(config).save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    return make_checkpoint(tmp_path / "model")


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


def test_head_follows_the_labels(tmp_path, capsys):
    assert command.head_of([{"text": "a"}]) == "causal-lm"
    assert command.head_of([{"text": "a", "label": 1}, {"text": "b", "label": 0.5}]) == "regression"
    checkpoint = make_checkpoint(tmp_path / "headless", "BertModel")
    task, out = tmp_path / "task.jsonl", tmp_path / "mask.safetensors"
    for label, head in (("0.9", "regression"), ("2", "classification")):
        task.write_text(f'{{"text": "good", "label": {label}}}\n\n{{"text": "bad", "text_pair": "film", "label": 1}}\n')
        assert main(["fisher", str(checkpoint), str(task), "--out", str(out), "--device", "cpu"]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith(head) and "drawn at random: classifier.bias, classifier.weight" in printed


def test_a_trained_head_is_kept_where_the_task_shows_fewer_classes(tmp_path, task, capsys):
    """The head that is used is the checkpoint's own, bit for bit."""
    folder = make_checkpoint(tmp_path / "three", num_labels=3)
    tokenizer, model = command.load(folder, "classification", command.read_task(task), "cpu")
    own = transformers.BertForSequenceClassification.from_pretrained(folder)
    assert torch.equal(model.classifier.weight, own.classifier.weight) and not model.drawn


def test_a_pair_belongs_to_its_own_example(checkpoint):
    """What the other examples of a batch are changes no example's tokens."""
    rows = [{"text": "a film", "label": 0, "line": 1}, {"text": "good", "text_pair": "not bad", "label": 1, "line": 2}]
    tokenizer, _ = command.load(checkpoint, "classification", rows, "cpu")
    together = next(command.batches(rows, tokenizer, "classification", 2, 16))
    for i, row in enumerate(rows):
        alone = next(command.batches([row], tokenizer, "classification", 1, 16))
        length = int(alone["attention_mask"].sum())
        for name in ("input_ids", "token_type_ids"):
            assert torch.equal(together[name][i, :length], alone[name][0])


def test_texts_are_cut_at_the_models_positions(tmp_path, capsys):
    """Without --max-length; RoBERTa's positions begin after the padding index."""
    short = make_checkpoint(tmp_path / "short", max_position_embeddings=12)
    task, out = tmp_path / "task.jsonl", str(tmp_path / "mask.safetensors")
    task.write_text("\n".join(json.dumps({"text": "good film " * n, "label": n % 2}) for n in (1, 100)))
    assert main(["fisher", str(short), str(task), "--out", out, "--device", "cpu"]) == 0
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, vocab_size=12)
    roberta = transformers.RobertaModel(transformers.RobertaConfig(**sizes, max_position_embeddings=20, pad_token_id=1))
    assert command.length_for(roberta, None) == 18 and command.length_for(roberta, 18) == 18
    ids = torch.randint(2, 12, (1, 18))
    roberta(input_ids=ids)  # as many as it takes
    with pytest.raises((IndexError, RuntimeError)):
        roberta(input_ids=torch.randint(2, 12, (1, 19)))


def test_causality_is_seen_not_believed(tmp_path, task):
    """GPT-2 is blind to later tokens; BERT is not, whatever its class is called."""
    rows = [{"text": "a good film", "line": 1}]
    bert = make_checkpoint(tmp_path / "bert", "BertLMHeadModel")
    tokenizer, model = command.load(bert, "causal-lm", rows, "cpu")
    assert not command.try_texts(tokenizer, model, "causal-lm", rows, 16, task)
    gpt = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=len(WORDS), n_embd=8, n_layer=1, n_head=2, n_positions=16)
    ).eval()
    assert command.try_texts(tokenizer, gpt, "causal-lm", rows, 16, task)


def run_twice(folder, task, tmp_path, *flags):
    found = []
    for name in ("one", "two"):
        out = tmp_path / f"{name}.safetensors"
        command_line = [sys.executable, "-m", "childtune_kernels", "fisher", folder, task, "--out", out, *flags]
        done = subprocess.run([*map(str, command_line), "--device", "cpu"], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        found.append((ChildMask.load(out), out.read_bytes(), done.stdout.splitlines()[-1].split("digest ")[1]))
    return found


def test_a_seed_repeats_itself_in_another_process(tmp_path, task):
    """Head and labels are drawn: mask, content and printed digest are equal, and another seed has another mask."""
    folder = make_checkpoint(tmp_path / "headless", "BertModel")
    (one, content, said), (two, again, too) = run_twice(folder, task, tmp_path, "--p", "0.1", "--labels", "sampled")
    assert one == two and said == too == f"{one.digest()}, seed 0"
    assert content == again
    other = tmp_path / "other.safetensors"
    flags = ["--out", str(other), "--device", "cpu", "--p", "0.1", "--labels", "sampled", "--seed", "1"]
    assert main(["fisher", str(folder), str(task), *flags]) == 0
    assert ChildMask.load(other) != one


def test_results_are_not_lost_when_their_place_is(checkpoint, task, tmp_path, monkeypatch, capsys):
    """The folder vanishes during the pass: exit 1, and the line says where the files are instead."""
    gone = tmp_path / "gone"
    gone.mkdir()
    estimate = command.estimate_fisher

    def slow(*args, **options):
        gone.rmdir()
        return estimate(*args, **options)

    monkeypatch.setattr(command, "estimate_fisher", slow)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    out = ["--out", str(gone / "mask.safetensors"), "--save-fisher", str(gone / "fisher.safetensors")]
    assert main(["fisher", str(checkpoint), str(task), *out, "--device", "cpu"]) == 1
    printed = capsys.readouterr()
    saved = re.findall(r"saved as (\S+?)(?:;|$)", printed.err.strip())
    assert printed.err.count("\n") == 1 and ChildMask.load(saved[1]).digest() in printed.out
    assert Fisher.load(saved[0]).count == 5
