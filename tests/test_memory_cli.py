"""`childtune memory`: a table of bytes a weight, from shapes that come from three places."""

from __future__ import annotations

import json
import re

import pytest

from childtune_kernels.cli import RENAMED, main


def rows(text: str) -> dict[str, list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return {cells[0]: cells[1:] for cells in ([c.strip() for c in line.strip("|").split("|")] for line in lines)}


def test_a_known_model(capsys):
    assert main(["memory", "--model", "llama-7b", "--p", "0.1"]) == 0
    text = capsys.readouterr().out
    assert "6,738,415,616 weights in 291 tensors, bfloat16" in text
    table = rows(text)
    assert table["AdamW, fp32 moments and masters"][:6] == ["2.00", "2.00", "8.00", "4.00", "0.00", "16.00"]
    assert table["D p=0.1"][:6] == ["2.00", "2.00", "0.80", "0.40", "0.40", "5.60"]
    assert float(table["D p=0.1, pack_gradients"][5]) < 4


def test_a_shape_file(tmp_path, capsys):
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps({"w": [100, 100], "b": [100]}))
    assert main(["memory", "--shapes", str(path), "--dtype", "float32", "--p", "0.3"]) == 0
    table = rows(capsys.readouterr().out)
    assert table["AdamW, fp32 moments"][:6] == ["4.00", "4.00", "8.00", "0.00", "0.00", "16.00"]
    assert table["AdamW, fp32 moments"][6] == "161.6 kB"  # 16 x 10,100 and two step counters
    assert table["D p=0.3"][2:5] == ["2.40", "0.00", "1.20"] and "masters" not in "".join(table)


def test_a_config(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50)
    config = transformers.BertConfig(**sizes, architectures=["BertForSequenceClassification"])
    config.save_pretrained(tmp_path)
    assert main(["memory", "--config", str(tmp_path)]) == 0
    model = transformers.BertForSequenceClassification(config)
    assert f"{sum(p.numel() for p in model.parameters()):,} weights" in capsys.readouterr().out


def test_the_old_name_is_understood_and_not_listed(capsys):
    call = ["--model", "bert-large", "--dtype", "float32"]
    assert main(["memory", *call]) == 0
    said = capsys.readouterr().out
    assert main(["plan", *call]) == 0 and capsys.readouterr().out == said
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--p", "2"])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("childtune memory: argument --p: must be in")
    with pytest.raises(SystemExit):
        main(["--help"])
    words = re.findall(r"\w+", capsys.readouterr().out)
    assert words.count("memory") == 2 and not set(RENAMED) & set(words)  # its line and "how much memory"
