"""Bad command lines: one line on stderr, the right exit code, nothing written, nothing asked of the network."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from childtune_kernels import ChildDelta, ChildMask
from childtune_kernels.cli import COMMANDS, bench, doctor, inputs, main
from childtune_kernels.cli import fisher as fisher_command

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "the", "not"]
SIZES = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, vocab_size=len(WORDS))
LABELLED = [{"text": "a good film", "label": 1}, {"text": "not good", "label": 0}]


def save_model(folder, model, tokenizer=True):
    model.save_pretrained(folder)
    if tokenizer:
        (folder / "vocab.txt").write_text("\n".join(WORDS))
        transformers.BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder with checkpoints and files, whole and damaged; commands run in it and must leave it as it is."""
    room = tmp_path_factory.mktemp("room")
    short = dict(**SIZES, max_position_embeddings=16)
    head = transformers.BertForSequenceClassification
    save_model(room / "three", head(transformers.BertConfig(**short, num_labels=3)))
    save_model(room / "bare", transformers.BertModel(transformers.BertConfig(**short)))
    save_model(room / "mute", head(transformers.BertConfig(**short)), tokenizer=False)
    save_model(room / "wide", head(transformers.BertConfig(**{**short, "vocab_size": 6})))
    gpt = transformers.GPT2Config(vocab_size=len(WORDS), n_embd=8, n_layer=1, n_head=2, n_positions=16)
    save_model(room / "gpt", transformers.GPT2LMHeadModel(gpt))
    nan = transformers.BertModel(transformers.BertConfig(**short))
    nan.embeddings.word_embeddings.weight.data.fill_(torch.nan)
    save_model(room / "nan", nan)
    for name in ("truncated", "lost", "other", "no_config", "no_vocab", "bad_config"):
        shutil.copytree(room / "three", room / name)
    weights = room / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (room / "lost" / "model.safetensors").unlink()
    save_file({"x": torch.ones(3)}, room / "other" / "model.safetensors", {"format": "pt"})
    (room / "no_config" / "config.json").unlink()
    (room / "bad_config" / "config.json").write_text("{")
    for file in ("vocab.txt", "tokenizer.json"):
        (room / "no_vocab" / file).unlink(missing_ok=True)
    config = json.loads((room / "no_vocab" / "tokenizer_config.json").read_text())
    (room / "no_vocab" / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "BertTokenizer"}))
    (room / "sub").mkdir()
    (room / "folder.safetensors").mkdir()
    (room / "folder.json").mkdir()
    ChildMask.from_dense({"w": torch.ones(40, dtype=torch.bool)}).save(room / "mask.safetensors")
    ChildMask.from_dense({"v": torch.ones(40, dtype=torch.bool)}).save(room / "strange.safetensors")
    base, tuned = {"w": torch.arange(300.0)}, {"w": torch.arange(300.0)}
    tuned["w"][7] = -1
    save_file(base, room / "base.safetensors")
    save_file(tuned, room / "tuned.safetensors")
    ChildDelta.from_models(base, tuned).save(room / "delta.safetensors")
    (room / "binary.safetensors").write_bytes(bytes(range(256)))
    (room / "binary.jsonl").write_bytes(b"\xff\xfe\x00{")
    (room / "bad.json").write_text('{"w": [3]}\n}')
    (room / "large.json").write_text('{"w": "large"}')
    (room / "yes.json").write_text('{"w": [true]}')
    (room / "empty.json").write_text("{}")
    return room


def task_file(room, rows) -> str:
    lines = rows if isinstance(rows, str) else "\n".join(json.dumps(row) for row in rows)
    (room / "task.jsonl").write_text(lines)
    return "task.jsonl"


def listing(room):
    return {
        p.relative_to(room): p.stat().st_mtime_ns for p in room.rglob("*") if p.is_file() and p.name != "task.jsonl"
    }


@pytest.fixture
def refused(room, monkeypatch, capsys):
    """Run a command line that must be refused; nothing may reach the network or be written."""

    def nowhere(*args, **kwargs):
        raise AssertionError("went to the network")

    monkeypatch.chdir(room)
    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    monkeypatch.setattr(socket.socket, "connect", nowhere)
    monkeypatch.setattr(fisher_command, "estimate_fisher", lambda *a, **k: pytest.fail("the work had begun"))
    monkeypatch.setattr(bench, "difference", lambda *a: pytest.fail("the work had begun"))

    def check(argv, fragment, code=2):
        before = listing(room)
        capsys.readouterr()
        try:
            got = main(argv)
        except SystemExit as stop:
            got = stop.code
        out, err = capsys.readouterr()
        assert got == code, err
        assert fragment in err and err.count("\n") == 1 and "Traceback" not in err, err
        assert err.startswith("childtune") and not out
        assert listing(room) == before

    return check


# ---- fisher ---------------------------------------------------------------------------------------------------------

OK = LABELLED
LONG = [{"text": "good " * 50, "label": 1}]


def labels(*values):
    return [{"text": "good", "label": value} for value in values]


FISHER = [  # checkpoint, task, flags, what the line says
    ("three", OK, "--p 0", "--p: must be in (0, 1], got 0"),
    ("three", OK, "--p 1.5", "--p: must be in (0, 1], got 1.5"),
    ("three", OK, "--p nan", "--p: must be in (0, 1], got nan"),
    ("three", OK, "--p -0.1", "--p: must be in (0, 1], got -0.1"),
    ("three", OK, "--p much", "--p: must be in (0, 1], got much"),
    ("three", OK, "--batch-size 0", "--batch-size: expected a whole number of at least 1, got '0'"),
    ("three", OK, "--batch-size -3", "--batch-size: expected a whole number of at least 1, got '-3'"),
    ("three", OK, "--max-length 0", "--max-length: expected a whole number of at least 1, got '0'"),
    ("three", OK, "--limit 0", "--limit: expected a whole number of at least 1, got '0'"),
    ("three", OK, "--limit 1.5", "--limit: expected a whole number of at least 1, got '1.5'"),
    ("three", OK, "--seed -1", "--seed: expected a whole number of at least 0, got '-1'"),
    ("three", OK, "--seed 99999999999999999999", "and at most 4294967295"),
    ("three", OK, "--device tpu", "--device: expected auto, cpu or cuda, got 'tpu'"),
    ("three", OK, "--device cuda:77", "--device: expected a device that torch sees, got 'cuda:77'"),
    ("three", OK, "--rule none", "invalid choice: 'none'"),
    ("three", OK, "--save-fisher nodir/f.safetensors", "--save-fisher: expected a .safetensors file in a folder"),
    ("three", OK, "--save-fisher out.safetensors", "--save-fisher must be a file of its own, got out.safetensors"),
    ("three", LONG, "--max-length 17", "--max-length must be at most 16, the model's positions, got 17"),
    ("three", OK, "--max-length 2", "line 1"),
    ("nope", OK, "", "checkpoint must be a folder with a config.json, got nope"),
    ("bert-base-uncased", OK, "", "checkpoint must be a folder with a config.json, got bert-base-uncased"),
    ("no_config", OK, "", "checkpoint must be a folder with a config.json, got no_config"),
    ("bad_config", OK, "", "bad_config"),
    ("mute", OK, "", "mute must hold a tokenizer"),
    ("no_vocab", OK, "", "no word that the tokenizer knows"),
    ("wide", OK, "", "but the model knows 6: is this its tokenizer?"),
    ("truncated", OK, "", "truncated"),
    ("lost", OK, "", "lost"),
    ("other", OK, "", "other must hold the weights of its config.json"),
    ("nan", OK, "", "the model must give a finite loss"),
    ("three", None, "", "No such file or directory: 'task.jsonl'"),
    ("three", "", "", "task.jsonl must hold at least one example"),
    ("three", "text,label\na,1", "", "task.jsonl, line 1 must be a JSON object, got 'text,label'"),
    ("three", "[1]", "", 'task.jsonl, line 1 must be a JSON object with a "text"'),
    ("three", "[" * 100_000, "", "task.jsonl, line 1 must be a JSON object"),
    ("three", [OK[0], {"sentence": "a", "label": 1}], "", 'task.jsonl, line 2 must be a JSON object with a "text"'),
    ("three", [{"text": "good", "labels": 1}], "", "task.jsonl, line 1 must have no keys but text, text_pair, label"),
    ("three", [OK[0], {"text": "good"}], "", "task.jsonl, line 2 must have a label like the first line"),
    ("three", [{"text": " ", "label": 1}], "", "task.jsonl, line 1 must have a text that is not empty"),
    ("three", [{"text": "a", "text_pair": 3, "label": 1}], "", "line 1 must have a text as text_pair, got 3"),
    (
        "three",
        labels(0, "neg"),
        "",
        "task.jsonl, line 2: labels must be class numbers from 0 on, or numbers, got 'neg'",
    ),
    ("three", labels(0, None), "", "task.jsonl, line 2: labels must be class numbers from 0 on, or numbers, got None"),
    ("three", labels(True), "", "line 1: labels must be class numbers from 0 on, or numbers, got True"),
    ("three", labels([1]), "", "line 1: labels must be class numbers from 0 on, or numbers, got [1]"),
    ("three", labels(0, -1), "", "task.jsonl, line 2: labels must be class numbers from 0 on, got -1"),
    ("bare", labels(0.5, float("nan")), "", "line 2: labels must be class numbers from 0 on, or numbers, got nan"),
    ("bare", labels(0.5, 1e300), "", "line 2: labels must be class numbers from 0 on, or numbers, got 1e+300"),
    ("bare", labels(0.5, 10**400), "", "line 2: labels must be class numbers from 0 on, or numbers, got 1000"),
    ("bare", labels(0.5, "good"), "--head regression", "line 2: labels must be class numbers from 0 on, or numbers"),
    ("three", labels(0, 0.5), "--head classification", "line 2: labels must be class numbers from 0 on, got 0.5"),
    ("three", labels(0.5), "", "three must have a head of 1 output, or none, for a regression, got one of 3 outputs"),
    ("bare", labels(0.5), "--labels predicted", "--labels must be true or sampled for a regression"),
    ("three", labels(0, 3), "", "line 2: label 3 needs 4 classes, but the checkpoint's own head has 3 outputs"),
    ("bare", labels(0, 5_000_000), "", "line 2: label 5000000 needs a head of 5,000,001 classes, of which 2 occur"),
    ("bare", labels(1999, 2005), "", "number the classes from 0 on, or write 3.0 for a regression"),
    ("three", [{"text": "good"}], "", 'task.jsonl must have a "label" in every line, got none'),
    ("bare", [{"text": "good"}], "", 'task.jsonl must have a "label" in every line, got none'),
    ("three", [{"text": "good"}], "--head classification", "in every line for --head classification, got none"),
    ("three", [{"text": "good"}], "--head regression", "in every line for --head regression, got none"),
    ("gpt", OK, "--scope released", "--scope released must find parameters with 'layer' in their name"),
]


@pytest.mark.parametrize("checkpoint, rows, flags, fragment", FISHER, ids=[f[3][:40] for f in FISHER])
def test_fisher_refuses_before_it_starts(checkpoint, rows, flags, fragment, room, refused):
    (room / "task.jsonl").unlink(missing_ok=True)
    if rows is not None:
        task_file(room, rows)
    refused(["fisher", checkpoint, "task.jsonl", "--out", "out.safetensors", *flags.split()], fragment)


def test_fisher_names_a_binary_task(refused):
    refused(["fisher", "three", "binary.jsonl", "--out", "out.safetensors"], "binary.jsonl cannot be read")


OUT = ["nodir/m.safetensors", "folder.safetensors", "mask.json", "/proc/m.safetensors", "x" * 260 + ".safetensors"]


@pytest.mark.parametrize("out", OUT, ids=["missing-folder", "folder", "suffix", "proc", "long-name"])
@pytest.mark.parametrize(
    "command", ["fisher three task.jsonl --out", "delta make base.safetensors tuned.safetensors -o"]
)
def test_outputs_are_tried_first(command, out, refused):
    refused([*command.split(), out], f"expected a .safetensors file in a folder that exists, got {out!r}"
            if out in OUT[:1] + OUT[2:3] else "expected a file that can be written, got")  # fmt: skip


def test_a_read_only_file_is_not_replaced(monkeypatch, refused):
    def read_only(path, mode):  # what everybody but the superuser gets
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(inputs, "open", read_only, raising=False)
    refused(["fisher", "three", "task.jsonl", "--out", "mask.safetensors"], "expected a file that can be written")


def test_fisher_does_not_write_over_its_checkpoint(room, refused):
    task_file(room, OK)
    refused(["fisher", "three", "task.jsonl", "--out", "three/model.safetensors"], "which is a file that is read")


def test_a_causal_lm_needs_no_labels(room, monkeypatch, capsys):
    """A decoder takes texts alone; of BERT they are taken only if the user says so, with a note."""
    monkeypatch.chdir(room)
    task_file(room, [{"text": "a good film"}])
    save = ["--out", str(room / "causal.safetensors"), "--device", "cpu"]
    assert main(["fisher", "gpt", "task.jsonl", *save]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("causal-lm, 1 examples") and not err
    with pytest.warns(UserWarning, match="this model sees the tokens that it is asked to predict"):
        assert main(["fisher", "three", "task.jsonl", *save, "--head", "causal-lm"]) == 0
    (room / "causal.safetensors").unlink()


# ---- the other commands ---------------------------------------------------------------------------------------------

OTHERS = [
    ("memory --model bert-large --p 0", "--p: must be in (0, 1], got 0"),
    ("memory --model bert-large --p 1.5", "--p: must be in (0, 1], got 1.5"),
    ("memory --model bert-large --p inf", "--p: must be in (0, 1], got inf"),
    ("memory --model gpt-5", "invalid choice: 'gpt-5'"),
    ("memory", "one of the arguments --model --config --shapes is required"),
    ("memory --config nope", "--config must be a folder with a config.json, got nope"),
    ("memory --config bert-large-uncased", "--config must be a folder with a config.json, got bert-large-uncased"),
    ("memory --config bad_config", "bad_config"),
    ("memory --shapes absent.json", "absent.json"),
    ("memory --shapes bad.json", "bad.json cannot be read: Extra data: line 2 column 1"),
    ("memory --shapes binary.jsonl", "binary.jsonl cannot be read"),
    ("memory --shapes large.json", "large.json must hold an object of parameter name -> list of sizes"),
    ("memory --shapes yes.json", "yes.json must hold an object of parameter name -> list of sizes"),
    ("memory --shapes empty.json", "empty.json must hold an object of parameter name -> list of sizes"),
    ("bench --device cuda:77", "--device: expected a device that torch sees"),
    ("bench --device tpu", "--device: expected auto, cpu or cuda, got 'tpu'"),
    ("bench --device cpu --impl triton", "--impl triton is not available on cpu: Triton"),
    ("bench --rounds 0", "--rounds: expected a whole number of at least 1, got '0'"),
    ("bench --repeats -1", "--repeats: expected a whole number of at least 1, got '-1'"),
    ("bench --device cpu --only zzz", "--only and --skip must leave a row, of torch AdamW fused"),
    ("bench --device cpu --only", "--only: expected at least one argument"),
    ("bench --json nodir/x.json", "--json: expected a .json file in a folder that exists, got 'nodir/x.json'"),
    ("bench --json folder.json", "--json: expected a file that can be written, got 'folder.json'"),
    ("demo --seeds 0", "--seeds: expected a whole number of at least 1, got '0'"),
    ("demo --methods vanilla,G", "--methods: expected some of vanilla,F,D, each once, got 'vanilla,G'"),
    ("demo --device cuda:77", "--device: expected a device that torch sees"),
    ("demo --plot folder.json", "--plot: expected a .png file in a folder that exists"),
    ("doctor --fast", "unrecognized arguments: --fast"),
    ("overlap mask.safetensors mask.safetensors", "each file must be given once"),
    ("overlap mask.safetensors absent.safetensors", "absent.safetensors"),
    ("overlap three", "three"),
    ("overlap binary.safetensors", "binary.safetensors must hold"),
    ("overlap base.safetensors", "base.safetensors must hold"),
    ("overlap mask.safetensors strange.safetensors", "strange.safetensors must be of the same model as mask"),
    ("overlap mask.safetensors --json nodir/x.json", "--json: expected a .json file in a folder that exists"),
    ("overlap mask.safetensors --json folder.json", "--json: expected a file that can be written"),
    ("overlap mask.safetensors --plot x.png --density-plot x.png", "--density-plot must be a file of its own"),
    ("delta make base.safetensors absent.safetensors -o out.safetensors", "absent.safetensors"),
    ("delta make base.safetensors binary.safetensors -o out.safetensors", "binary.safetensors cannot be read"),
    ("delta make base.safetensors sub -o out.safetensors", "sub must hold model.safetensors, a single file"),
    ("delta make base.safetensors truncated -o out.safetensors", "truncated/model.safetensors cannot be read"),
    ("delta make base.safetensors tuned.safetensors -o tuned.safetensors", "which is a file that is read"),
    ("delta apply tuned.safetensors delta.safetensors -o out.safetensors", "the base of this delta"),
    ("delta apply base.safetensors mask.safetensors -o out.safetensors", "mask.safetensors must hold"),
    ("delta revert base.safetensors delta.safetensors base.safetensors -o out.safetensors", "as this delta made it"),
    ("delta info binary.safetensors", "binary.safetensors"),
    ("delta info", "the following arguments are required: DELTA"),
    ("delta melt", "invalid choice: 'melt'"),
]


@pytest.mark.parametrize("line, fragment", OTHERS, ids=[line for line, _ in OTHERS])
def test_the_others_refuse_before_they_start(line, fragment, refused):
    refused(line.split(), fragment)


def test_success_says_so(room, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(room)
    out = str(tmp_path / "out.safetensors")
    assert main(["delta", "apply", "base.safetensors", "delta.safetensors", "-o", out]) == 0
    assert capsys.readouterr().out == f"{out}: the tuned model, 1 tensors, 1.2 kB\n"
    back = str(tmp_path / "back.safetensors")
    assert main(["delta", "revert", out, "delta.safetensors", "base.safetensors", "-o", back]) == 0
    assert capsys.readouterr().out == f"{back}: the base, 1 tensors, 1.2 kB\n"
    assert torch.equal(load_file(back)["w"], load_file("base.safetensors")["w"])
    assert main(["delta", "make", "base.safetensors", back, "-o", out]) == 0
    assert capsys.readouterr().out.startswith("the two models are equal in every bit: ")


# ---- the command itself ---------------------------------------------------------------------------------------------


def test_bugs_are_one_line_and_a_traceback_on_demand(monkeypatch, capsys):
    def broken(*args):
        raise KeyError("a bug\nof two lines")

    monkeypatch.setattr(doctor, "difference", broken)
    monkeypatch.delenv("CHILDTUNE_DEBUG", raising=False)
    assert main(["doctor"]) == 1
    err = capsys.readouterr().err
    assert err == "childtune doctor: KeyError: 'a bug\\nof two lines' (CHILDTUNE_DEBUG=1 shows where)\n"
    monkeypatch.setenv("CHILDTUNE_DEBUG", "1")
    with pytest.raises(KeyError):
        main(["doctor"])


def test_warnings_say_who_warns():
    """And not where in the code: that is two lines of Python."""
    code = (
        "import warnings; from childtune_kernels import cli; cli._run = lambda argv: warnings.warn('so\\nit is') or 0"
    )
    code += "; raise SystemExit(cli.main(['memory']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "childtune memory: note: so it is\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_every_default(command, capsys):
    texts = []
    for argv in ([command, "--help"], *([["delta", "make", "--help"]] if command == "delta" else [])):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 0
        texts.append(capsys.readouterr().out)
    text = " ".join(" ".join(texts).split())
    for flag, default in {
        "fisher": [("--p P", "0.1"), ("--rule", "exact"), ("--labels", "true"), ("--scope", "backbone"),
                   ("--batch-size", "16"), ("--max-length", "128"), ("--seed", "0"), ("--device", "auto")],
        "bench": [("--dtype", "float32"), ("--rounds", "3"), ("--repeats", "20"), ("--device", "auto")],
        "memory": [("--p P", "0.1"), ("--dtype", "bfloat16")],
        "demo": [("--seeds", "5"), ("--methods", "all"), ("--device", "auto")],
    }.get(command, []):  # fmt: skip
        described = text[text.rindex(f" {flag} ") :]
        assert f"(default: {default}" in described[: described.index(")") + 1], (flag, described[:200])


def test_top_help_and_wrong_commands_import_no_torch():
    code = (
        "import sys; from childtune_kernels.cli import main\n"
        "try: main([{}])\nexcept SystemExit: pass\n"
        "assert not {{'torch', 'numpy', 'safetensors'}} & set(sys.modules)"
    )
    for argument in ("'--help'", "'--version'", "'dmeo'"):
        done = subprocess.run([sys.executable, "-c", code.format(argument)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


# Says that it is there, and stays until the interrupt comes.
STAY = "import sys, time\ndef stay(*args, **options):\n    print('here', flush=True)\n    time.sleep(600)\n"
IMPORTING = (
    STAY + "class Finder:\n    def find_spec(name, *where):\n        if name == {!r}: stay()\n"
    "sys.meta_path.insert(0, Finder)\n"
)
MOMENTS = {
    "before torch": IMPORTING.format("torch"),
    "inside of torch": IMPORTING.format("torch.nn"),
    "after torch": IMPORTING.format("childtune_kernels.measure.timing"),
    "at work": STAY + "import torch\ntorch.Tensor.backward = stay\n",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupt_is_one_line(moment):
    code = MOMENTS[moment] + "from childtune_kernels.cli import main\nsys.exit(main(['demo', '--device', 'cpu']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "here\n" in iter(process.stdout.readline, ""), process.stderr.read()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "childtune demo: interrupted\n")


def test_an_interrupt_is_one_line_in_every_command(room, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.chdir(room)
    task_file(room, OK)
    monkeypatch.setattr(fisher_command, "load", interrupted)
    monkeypatch.setattr(doctor, "machine", interrupted)
    monkeypatch.setattr(bench, "difference", interrupted)
    for line in ("fisher three task.jsonl --out x.safetensors", "doctor", "bench --device cpu"):
        assert main(line.split()) == 130
        assert capsys.readouterr().err == f"childtune {line.split()[0]}: interrupted\n"
