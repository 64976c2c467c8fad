"""What a Fisher pass estimates, refuses and leaves as it was; what the default scope masks, and what it says of it."""

from __future__ import annotations

import random
import subprocess
import sys
import warnings
from pathlib import Path

import models
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_fisher import alone, assert_same, one_by_one
from torch import nn
from torch.utils.data import DataLoader, Dataset

import childtune_kernels
from childtune_kernels.fisher import Fisher, causal_lm_loss, classification_loss, estimate_fisher, rules
from childtune_kernels.fisher.scope import backbone
from childtune_kernels.names import named_parameters

RULES = ("exact", "batch", "released")


def linear_loss(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")


def net(width: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2)).double()


def data(examples: int = 4) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    labels = torch.arange(examples) % 2
    return {"x": torch.randn(examples, 3, generator=draw).double(), "labels": labels}


# -- random state


def random_states() -> tuple:
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    name, keys, *rest = np.random.get_state()
    return random.getstate(), name, keys.tolist(), rest, [s.tolist() for s in (torch.get_rng_state(), *on_devices)]


class Augmented(Dataset):
    """Draws from every generator for each item."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        noise = random.random() + np.random.rand() + float(torch.rand(()))
        return {"x": torch.full((3,), noise).double(), "labels": index % 2}


class DrawsWhenAsked:
    """A loader whose iter() draws, before the first batch is made."""

    def __iter__(self):
        random.random(), np.random.rand(), torch.rand(())
        return iter([data()])


def drawing_batches():
    for _ in range(3):
        random.random(), np.random.rand(), torch.rand(())
        yield data()


LOADERS = {
    "shuffled": lambda: DataLoader(Augmented(), batch_size=2, shuffle=True),
    "workers": lambda: DataLoader(Augmented(), batch_size=2, shuffle=True, num_workers=1),
    "iter": DrawsWhenAsked,
    "generator": drawing_batches,
}


def drawing_loss(model, batch):
    random.random(), np.random.rand()
    return linear_loss(model, batch) * (1 + 0 * torch.rand(()))


@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("loader", LOADERS)
def test_random_state_is_untouched(loader, rule, limit):
    model, batches = net(), LOADERS[loader]()
    before = random_states()
    estimate_fisher(model, batches, drawing_loss, rule=rule, limit=limit)
    assert random_states() == before


@pytest.mark.parametrize("when", ["iter", "next", "empty", "second batch", "loss"])
def test_random_state_is_untouched_by_what_raises(when):
    class Raises:
        def __iter__(self):
            random.random(), np.random.rand(), torch.rand(())
            if when == "iter":
                raise KeyError(when)
            return self.batches()

        def batches(self):
            random.random(), np.random.rand(), torch.rand(())
            if when == "next":
                raise KeyError(when)
            if when == "empty":
                return
            yield data()
            random.random(), np.random.rand(), torch.rand(())
            raise KeyError(when)

    def loss(model, batch):
        if when == "loss":
            random.random(), np.random.rand(), torch.rand(())
            raise KeyError(when)
        return drawing_loss(model, batch)

    model = net().train()
    before = random_states()
    with pytest.raises(ValueError if when == "empty" else KeyError):
        estimate_fisher(model, Raises(), loss)
    assert random_states() == before and all(module.training for module in model.modules())


@pytest.mark.gpu
def test_random_state_of_every_device_is_untouched():
    def loss(model, batch):
        for device in range(torch.cuda.device_count()):
            torch.rand((), device=device)
        return linear_loss(model, batch)

    model, before = net(), random_states()
    estimate_fisher(model, [data()], loss)  # the model is on the CPU
    assert random_states() == before


def test_modes_are_put_back_when_changing_them_raises():
    class Stubborn(nn.Linear):
        def train(self, mode=True):
            if not mode:
                raise RuntimeError("always trains")
            return super().train(mode)

    model = nn.Sequential(nn.Dropout(), Stubborn(3, 2)).double()
    with pytest.raises(RuntimeError, match="always trains"):
        estimate_fisher(model, [data()], linear_loss)
    assert all(module.training for module in model.modules())


# -- which weights


def _models() -> dict:
    t = pytest.importorskip("transformers")
    b = models._bert_like()
    llama = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=37)
    llama |= dict(intermediate_size=24, pad_token_id=0)
    t5 = dict(vocab_size=37, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    bart = dict(vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2)
    bart |= dict(decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24)
    whisper = bart | dict(num_mel_bins=4, max_source_positions=8, max_target_positions=8, pad_token_id=0)
    distil = dict(vocab_size=37, dim=16, n_layers=1, n_heads=2, hidden_dim=24)
    wav = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, conv_dim=(8, 8))
    wav |= dict(conv_stride=(2, 2), conv_kernel=(3, 3), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    vit = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8)
    clip = t.CLIPConfig(vision_config=vit | dict(patch_size=4), text_config=dict(b) | dict(eos_token_id=2))
    return {
        "bert": (t.BertForSequenceClassification, t.BertConfig(**b), ["classifier"]),
        "bert-bare": (t.BertModel, t.BertConfig(**b), []),
        "bert-mlm": (t.BertForMaskedLM, t.BertConfig(**b), []),
        "bert-mlm-untied": (t.BertForMaskedLM, t.BertConfig(**b, tie_word_embeddings=False), []),
        "bert-pretraining": (t.BertForPreTraining, t.BertConfig(**b), []),
        "bert-nsp": (t.BertForNextSentencePrediction, t.BertConfig(**b), []),
        "bert-tokens": (t.BertForTokenClassification, t.BertConfig(**b), ["classifier"]),
        "bert-decoder": (
            t.BertGenerationDecoder,
            t.BertGenerationConfig(**b, is_decoder=True, tie_word_embeddings=False),
            [],
        ),
        "bert-mine": (
            type("MyModel", (t.BertForTokenClassification,), {"__module__": "mine"}),
            t.BertConfig(**b),
            ["classifier"],
        ),
        "roberta": (t.RobertaForSequenceClassification, t.RobertaConfig(**b), ["classifier"]),
        "distilbert-mlm": (t.DistilBertForMaskedLM, t.DistilBertConfig(**distil), []),
        "distilbert": (
            t.DistilBertForSequenceClassification,
            t.DistilBertConfig(**distil),
            ["classifier", "pre_classifier"],
        ),
        "electra": (t.ElectraForPreTraining, t.ElectraConfig(**b, embedding_size=8), []),
        "xlnet": (
            t.XLNetForSequenceClassification,
            t.XLNetConfig(vocab_size=37, d_model=16, n_layer=1, n_head=2, d_inner=24),
            ["logits_proj", "sequence_summary"],
        ),
        "llama": (t.LlamaForCausalLM, t.LlamaConfig(**llama), []),  # lm_head is not tied
        "llama-tied": (t.LlamaForCausalLM, t.LlamaConfig(**llama, tie_word_embeddings=True), []),
        "llama-cls": (t.LlamaForSequenceClassification, t.LlamaConfig(**llama), ["score"]),
        "llama-qa": (t.LlamaForQuestionAnswering, t.LlamaConfig(**llama), ["qa_outputs"]),
        "gpt2": (t.GPT2LMHeadModel, t.GPT2Config(vocab_size=37, n_positions=8, n_embd=16, n_layer=1, n_head=2), []),
        "t5": (t.T5ForConditionalGeneration, t.T5Config(**t5), []),
        "t5-untied": (t.T5ForConditionalGeneration, t.T5Config(**t5, tie_word_embeddings=False), []),
        "t5-bare": (t.T5Model, t.T5Config(**t5), []),
        "t5-cls": (t.T5ForSequenceClassification, t.T5Config(**t5), ["classification_head"]),
        "t5-qa": (t.T5ForQuestionAnswering, t.T5Config(**t5), ["qa_outputs"]),
        "bart": (t.BartForConditionalGeneration, t.BartConfig(**bart), []),
        "bart-cls": (t.BartForSequenceClassification, t.BartConfig(**bart), ["classification_head"]),
        "whisper": (t.WhisperForConditionalGeneration, t.WhisperConfig(**whisper), []),
        "whisper-cls": (t.WhisperForAudioClassification, t.WhisperConfig(**whisper), ["classifier", "projector"]),
        "wav2vec2-ctc": (t.Wav2Vec2ForCTC, t.Wav2Vec2Config(**wav, vocab_size=37), ["lm_head"]),
        "vit": (t.ViTForImageClassification, t.ViTConfig(**vit, patch_size=4), ["classifier"]),
        "dinov3": (t.DINOv3ViTModel, t.DINOv3ViTConfig(**vit, patch_size=4), []),  # its .model is a part
        "clip": (t.CLIPModel, clip, []),
        "clip-cls": (t.CLIPForImageClassification, clip, ["classifier"]),
    }


MODELS = (
    "bert bert-bare bert-mlm bert-mlm-untied bert-pretraining bert-nsp bert-tokens bert-decoder bert-mine roberta "
    "distilbert-mlm distilbert electra xlnet llama llama-tied llama-cls llama-qa gpt2 t5 t5-untied t5-bare t5-cls "
    "t5-qa bart bart-cls whisper whisper-cls wav2vec2-ctc vit dinov3 clip clip-cls"
).split()


class Holder(nn.Module):
    """As LightningModule and the like: a model among other things, with its attributes forwarded."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


class Replica(nn.Module):
    """As DistributedDataParallel: the model is .module and nothing is forwarded."""

    def __init__(self, model):
        super().__init__()
        self.module = model


WRAPPERS = {
    "bare": lambda model: model,
    "compiled": torch.compile,
    "replica": Replica,
    "compiled replica": lambda model: torch.compile(Replica(torch.compile(model))),
    "holder": Holder,
}


def outside(model: nn.Module) -> set[str]:
    named = {name: p for name, p in named_parameters(model).items() if p.requires_grad}
    return set(named) - set(backbone(model, named))


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", MODELS)
def test_default_scope_leaves_fresh_heads_out(name, wrapper):
    kind, config, heads = _models()[name]
    with torch.device("meta"):
        model = WRAPPERS[wrapper](kind(config))
    assert {n.removeprefix("inner.").split(".")[0] for n in outside(model)} == set(heads)
    assert all(n.removeprefix("inner.").startswith(tuple(heads)) for n in outside(model))


def test_default_scope_of_a_compiled_submodule_and_of_other_models():
    kind, config, _ = _models()["bert"]
    model = kind(config)
    model.bert = torch.compile(model.bert)
    assert outside(model) == {"classifier.weight", "classifier.bias"}
    assert outside(net()) == set()
    assert outside(nn.ModuleDict({"encoder": kind(config).bert, "head": nn.Linear(3, 2)})) == set()


def test_a_part_of_an_adapters_name_is_none_without_peft():
    assert outside(nn.ModuleDict({"lora_mix": nn.Linear(3, 3), "body": nn.Linear(3, 3)})) == set()


class LoraLayer(nn.Module):
    """As PEFT's: the frozen layer and trained factors, by adapter name."""

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self, layer: nn.Linear, zero: bool = True):
        super().__init__()
        self.base_layer = layer.requires_grad_(False)
        kind = dict(bias=False, dtype=layer.weight.dtype)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, 2, **kind)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, layer.out_features, **kind)})
        if zero:
            nn.init.zeros_(self.lora_B["default"].weight)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class SavedLayer(nn.Module):
    adapter_layer_names = ("modules_to_save",)

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.original_module = layer.requires_grad_(False)
        copy = type(layer)(layer.in_features, layer.out_features, dtype=layer.weight.dtype)
        self.modules_to_save = nn.ModuleDict({"default": copy})

    def forward(self, x):
        return self.modules_to_save["default"](x)


class Adapted(Holder):
    """As PeftModel in structure and names: base_model.model., attributes forwarded."""

    def __init__(self, model):
        super().__init__(model)
        del self.inner
        self.base_model = nn.Module()
        self.base_model.model = model
        self.peft_config = {"default": None}

    def __getattr__(self, name):
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            return getattr(nn.Module.__getattr__(self, "base_model").model, name)

    def forward(self, **inputs):
        return self.base_model.model(**inputs)


def adapted(zero: bool = True) -> nn.Module:
    model = models.build("bert").requires_grad_(False)
    for layer in model.bert.encoder.layer:
        layer.attention.self.query = LoraLayer(layer.attention.self.query, zero)
    model.bert.pooler.dense = SavedLayer(model.bert.pooler.dense)
    model.classifier.requires_grad_(True)
    return Adapted(model).eval()


def test_default_scope_of_adapters():
    model = adapted()
    model.base_model.model.bert.embeddings.LayerNorm.requires_grad_(True)  # trained beside the adapters
    saved = {f"base_model.model.bert.pooler.dense.modules_to_save.default.{part}" for part in ("weight", "bias")}
    head = {f"base_model.model.classifier.{part}" for part in ("weight", "bias")}
    norm = {f"base_model.model.bert.embeddings.LayerNorm.{part}" for part in ("weight", "bias")}
    assert outside(model) == saved | head | norm
    with pytest.warns(UserWarning, match="no information at all in '.*lora_A.*train a few steps before"):
        mask = estimate_fisher(model, [models.batch("bert", 3, 5)], classification_loss, rule="batch").top(0.5)
    assert len(mask) == 4 and all("lora_" in name for name in mask)


def test_default_scope_of_adapters_of_an_unknown_kind():
    """What PEFT trains fully is told by its name, what else trains is the adapter."""
    model = models.build("bert").requires_grad_(False)
    model.bert.pooler.dense = SavedLayer(model.bert.pooler.dense)
    model.bert.prompt = nn.Parameter(torch.zeros(3, 16))
    assert outside(Adapted(model)) == {
        f"base_model.model.bert.pooler.dense.modules_to_save.default.{part}" for part in ("weight", "bias")
    }


def test_adapters_are_told_by_the_names_that_their_class_gives():
    class Adapter(nn.Module):
        adapter_layer_names = ("down.first", "up")

        def __init__(self):
            super().__init__()
            self.down = nn.ModuleDict({"first": nn.Linear(3, 2)})
            self.up, self.scale = nn.Linear(2, 3), nn.Linear(3, 3)

    model = nn.ModuleDict({"adapter": Adapter(), "norm": nn.LayerNorm(3), "first": nn.Linear(2, 2)})
    assert outside(model) == set()
    model.peft_config = {"default": None}
    beside = ("adapter.scale", "norm")
    assert outside(model) == {f"{name}.{part}" for name in beside for part in ("weight", "bias")}


@pytest.mark.parametrize("wrapper", ["bare", "compiled", "replica"])
@pytest.mark.parametrize("kind", ["LoraConfig", "IA3Config", "LoHaConfig", "VeraConfig"])
def test_default_scope_of_peft(kind, wrapper):
    peft = pytest.importorskip("peft")
    options = dict(feedforward_modules=[]) if kind == "IA3Config" else {}
    config = getattr(peft, kind)(task_type="SEQ_CLS", target_modules=["query", "value"], **options)
    model = WRAPPERS[wrapper](peft.get_peft_model(models.build("bert").float(), config))
    trained = {name for name, p in named_parameters(model).items() if p.requires_grad}
    head = {f"base_model.model.classifier.modules_to_save.default.{part}" for part in ("weight", "bias")}
    assert outside(model) == head and trained > head


def test_default_scope_of_peft_prompts_and_language_models():
    peft = pytest.importorskip("peft")
    prompts = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3, num_layers=2, token_dim=16,
                                      num_attention_heads=2)  # fmt: skip
    model = peft.get_peft_model(models.build("bert").float(), prompts)
    assert all(".classifier." in name or name.startswith("base_model.classifier") for name in outside(model))
    causal = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])
    assert outside(peft.get_peft_model(models.build("llama").float(), causal)) == set()


@pytest.mark.parametrize("wrapper", ["compiled", "replica"])
def test_a_wrapped_model_is_estimated_under_bare_names(wrapper):
    model, batches = models.build("bert"), [models.batch("bert", 3, 5)]
    bare = estimate_fisher(model, batches, classification_loss)
    wrapped = WRAPPERS["replica"](model) if wrapper == "replica" else torch.compile(model, backend="eager")

    def loss(wrapped, batch):
        return classification_loss(model, batch)

    fisher = estimate_fisher(wrapped, batches, loss)
    assert_same(fisher, bare.sums)
    assert fisher.backbone == bare.backbone and fisher.top(0.1) == bare.top(0.1)
    prefix = {"compiled": "_orig_mod.", "replica": "module."}[wrapper]
    one = estimate_fisher(wrapped, batches, loss, include=[prefix + "classifier.bias", "bert.pooler.dense.bias"])
    assert list(one) == ["classifier.bias", "bert.pooler.dense.bias"]
    assert list(fisher.top(0.5, scope=[prefix + "bert.pooler.dense.bias"])) == ["bert.pooler.dense.bias"]
    rest = estimate_fisher(model, batches, classification_loss, exclude=[prefix + "classifier.bias"])
    assert set(bare) - set(rest) == {"classifier.bias"}


# -- what top() and report() say


def quiet(call):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call()


def made(**weights) -> Fisher:
    """Scores 1, 2, 3, ... for tensors of so many weights; "head" is outside the backbone."""
    sums = {name: torch.arange(1.0, 1 + count) for name, count in weights.items()}
    return Fisher(sums, 1, backbone=[name for name in sums if name != "head"])


def test_much_full_training_is_warned_of():
    with pytest.warns(UserWarning, match=r"101 weights are trained fully, beside a child of 4,999: 'head \(101\)'"):
        made(body=10000 - 101, head=101).top(0.505)  # 1.01 % of all weights
    with pytest.warns(UserWarning, match="11 weights are trained fully, beside a child of 100"):
        made(body=10000, head=11).bottom(0.01)  # 11 % of the child
    quiet(lambda: made(body=10000, head=10).top(0.01))  # 10 % of the child, 0.1 % of all
    quiet(lambda: made(body=9900, head=100).top(0.5))  # 1 % of all
    quiet(lambda: made(body=10000, head=5000).top(0.01, scope="all"))
    with pytest.warns(UserWarning, match=r"'head \(5,000\)', 'small \(5\)'"):
        made(body=10000, small=5, head=5000).top(0.5, scope=["body"])


def test_what_was_not_estimated_is_trained_fully_too():
    model, batches = models.build("bert"), [models.batch("bert", 3, 5)]
    names = [name for name in named_parameters(model) if name.startswith("bert.encoder")]
    for options in ({"include": names}, {"exclude": [n for n in named_parameters(model) if n not in names]}):
        fisher = estimate_fisher(model, batches, classification_loss, **options)
        rest = {n: p.numel() for n, p in named_parameters(model).items() if n not in names}
        assert fisher.left_out == rest
        with pytest.warns(UserWarning, match=rf"{sum(rest.values()):,} weights are trained fully, .*word_embeddings"):
            fisher.top(0.1, scope="all")
        assert f"of these not estimated: 'bert.embeddings.word_embeddings.weight ({37 * 16})'" in fisher.report()
    model.bert.embeddings.requires_grad_(False)
    frozen = estimate_fisher(model, batches, classification_loss, include=names)
    assert {n.split(".")[0] for n in frozen.left_out} == {"bert", "classifier"}
    assert not any("embeddings" in n for n in frozen.left_out)


def test_tensors_without_information_are_warned_of():
    fisher = Fisher({"a": torch.tensor([3.0, 2.0]), "b": torch.zeros(4), "none": torch.zeros(0)}, 1)
    with pytest.warns(UserWarning, match=r"no information at all in 'b': of these 4 weights 0 are in the child"):
        fisher.top(0.3)
    with pytest.warns(UserWarning, match=r"no information at all in 'b': of these 4 weights 2 are in the child"):
        fisher.top(0.5, per_tensor=True)
    with pytest.warns(UserWarning, match=r"of these 4 weights 3 are in the child, the first ones"):
        fisher.bottom(0.5)
    quiet(lambda: fisher.top(1.0))
    quiet(lambda: Fisher({"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([0.0, 1.0])}, 1).top(0.5))
    tiny = Fisher({"a": torch.ones(4).double(), "b": torch.full((4,), 1e-60).double()}, 1)
    with pytest.warns(UserWarning, match="no information at all in 'b'"):  # none in float32, by which is chosen
        tiny.top(0.5)


def test_report_says_what_is_masked_and_what_is_trained_fully():
    model, batches = models.build("bert"), [models.batch("bert", 3, 5)]
    fisher = estimate_fisher(model, batches, classification_loss, exclude=["classifier.bias"])
    lines = fisher.report().splitlines()
    parts = {line.split()[0]: line.split()[3] for line in lines[1 : 1 + len(fisher)]}
    assert parts == {name: "whole" if name == "classifier.weight" else "masked" for name in fisher}
    masked, share = sum(fisher.sums[n].numel() for n in fisher.backbone), {}
    for name in ("backbone", "head"):
        names = fisher.backbone if name == "backbone" else ["classifier.weight"]
        share[name] = sum(float(fisher.sums[n].sum()) for n in names)
    total = sum(share.values())
    tensors = len(fisher) - 1
    body = f"masked in the default scope: {tensors} tensors, {masked:,} weights, {share['backbone'] / total:.2%} of"
    assert body in fisher.report()
    assert f"trained fully: 2 tensors, 51 weights, {share['head'] / total:.2%} of the information" in fisher.report()
    assert "'classifier.weight (48)', 'classifier.bias (3)'" in fisher.report()
    assert "of these not estimated: 'classifier.bias (3)'" in fisher.report()
    blank = Fisher({"a": torch.ones(3), "b": torch.zeros(2)}, 1).report()
    assert "without any information: 'b'" in blank and "trained fully: 0 tensors, 0 weights" in blank


@pytest.mark.parametrize(
    "rule, unit", [("exact", "1,234 examples"), ("batch", "1,234 batches"), ("released", "1,234 batches")]
)
def test_a_report_to_the_letter(rule, unit):
    sums = {"body.weight": torch.full((1000, 2), 0.5), "head": torch.tensor(3000.0), "none": torch.zeros(0, 3)}
    notes = {"body.weight": "product", "head": "one example at a time: why"}
    fisher = Fisher(sums, 1234, rule=rule, notes=notes, backbone=["body.weight", "none"], left_out={"more": 4000})
    assert fisher.report().split("\n") == [
        "parameter        weights    share  part    how",
        "body.weight        2,000   25.00%  masked  product",
        "head                   1   75.00%  whole   one example at a time: why",
        "none                   0    0.00%  masked  ",
        f"rule {rule!r}, {unit}",
        "masked in the default scope: 2 tensors, 2,000 weights, 25.00% of the information",
        "trained fully: 2 tensors, 4,001 weights, 75.00% of the information",
        "the largest of these: 'more (4,000)', 'head (1)'",
        "of these not estimated: 'more (4,000)'",
    ]
    nothing = Fisher({"a": torch.zeros(3), "b": torch.zeros(2, 2)}, 1, rule=rule).report().split("\n")
    assert [line.split()[1:3] for line in nothing[1:3]] == [["3", "0.00%"], ["4", "0.00%"]]
    assert nothing[-1] == "without any information: 'a', 'b'"


def test_values_are_means_over_what_was_counted():
    sums = {"a": torch.tensor([3.0, 6.0]), "b": torch.tensor([[9.0]]).double()}
    fisher = Fisher(sums, 3)
    assert fisher["a"].equal(torch.tensor([1.0, 2.0])) and len(fisher) == 2 and list(fisher) == ["a", "b"]
    assert {name: value.tolist() for name, value in fisher.items()} == {"a": [1.0, 2.0], "b": [[3.0]]}
    assert fisher.scores("all")["b"].dtype == torch.float32 and fisher["b"].dtype == torch.float64
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"count must be at least 1, got {count}"):
            Fisher(sums, count)


def test_scope_errors_say_what_names_look_like():
    model, batches = models.build("gpt2"), [models.batch("gpt2", 3, 5)]
    fisher = estimate_fisher(model, batches, causal_lm_loss)
    for scope in (lambda name: "layer" in name, "released", [], iter([])):
        with pytest.raises(ValueError, match="scope must hold at least one of the 28 .*'transformer.wte") as error:
            fisher.top(0.1, scope=scope)
        got = "'released'" if scope == "released" else "a function or names that hold none"
        assert f", got {got}: they are 'transformer.wte" in str(error.value) and " and 18 more" in str(error.value)
    with pytest.raises(ValueError, match="'backbone'.*they are 'head'"):
        Fisher({"head": torch.ones(3)}, 1, backbone=[]).top(0.5)
    with pytest.raises(ValueError, match=r"p must be in \(0, 1\], got 1.5"):
        fisher.top(1.5)
    with pytest.raises(ValueError, match="'bad'.* must not be NaN"):
        Fisher({"good": torch.ones(3), "bad": torch.tensor([1.0, torch.nan])}, 1).top(0.5)
    with pytest.raises(ValueError, match="backbone must name parameters in sums, got 'b'"):
        Fisher({"a": torch.ones(3)}, 1, backbone=["a", "b"])


# -- what is refused


def sharded_by(change):
    def build():
        model = net()
        change(model)
        return model

    return build


def placeholder(model):
    model[0].weight.ds_shape = model[0].weight.shape
    model[0].weight.data = torch.empty(0).double()


def lazy(model):
    model[0] = nn.LazyLinear(4)


def on_meta(model):
    model[2].to("meta")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "change, message",
    [(placeholder, "0.weight: a placeholder of DeepSpeed"), (lazy, "0.weight: not init"), (on_meta, "2.weight: meta")],
)
def test_parameters_that_are_not_here_are_refused(change, message, rule):
    model = sharded_by(change)()
    with pytest.raises(ValueError, match=f"model must be one whose parameters are whole.*{message}"):
        estimate_fisher(model, [data()], linear_loss, rule=rule)
    if change is placeholder:  # gathered
        model[0].weight.data = torch.ones(4, 3).double()
        assert len(estimate_fisher(model, [data()], linear_loss, rule=rule)) == 4


class FullyShardedDataParallel(nn.Sequential):
    """As torch's in name, which is what it is told by."""


@pytest.mark.parametrize("rule", RULES)
def test_a_sharded_part_is_named(rule):
    for model, name in (
        (FullyShardedDataParallel(*net()), "FullyShardedDataParallel"),
        (nn.Sequential(net(), FullyShardedDataParallel(nn.Linear(2, 2).double())), "1"),
    ):
        with pytest.raises(ValueError) as refusal:
            estimate_fisher(model, [data()], linear_loss, rule=rule)
        assert str(refusal.value) == (
            "model must be a model before FullyShardedDataParallel wraps it: estimate first, shard then, "
            f"got [{name!r}]"
        )


SHARDED = """
import sys, torch, torch.distributed as dist
from torch import nn
from childtune_kernels import estimate_fisher
dist.init_process_group("gloo", init_method=sys.argv[1], rank=0, world_size=1)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
mesh = init_device_mesh("cpu", (1,))
batch = {"x": torch.randn(4, 3), "labels": torch.arange(4) % 2}
loss = lambda m, b: nn.functional.cross_entropy(m(b["x"]), b["labels"], reduction="none")
net = lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
two, part, one, flat = net(), net(), net(), net()
FSDP = "model must be a model before FullyShardedDataParallel wraps it: estimate first, shard then, got ["
fully_shard(two, mesh=mesh)
fully_shard(part[1], mesh=mesh)
one = FullyShardedDataParallel(one, device_id=torch.device("cpu"), use_orig_params=True)
flat = nn.Sequential(FullyShardedDataParallel(flat, device_id=torch.device("cpu")))
for model, words in ((two, "0.weight: DTensor"), (part, "1.weight: DTensor"), (one, FSDP), (flat, "got ['0']")):
    for rule in ("exact", "batch", "released"):
        try:
            estimate_fisher(model, [batch], loss, rule=rule)
        except ValueError as error:
            assert words in str(error) and "estimate" in str(error), error
        else:
            raise AssertionError((words, rule))
dist.destroy_process_group()
"""


def test_sharded_models_are_refused(tmp_path):
    root = Path(childtune_kernels.__file__).parents[1]
    command = [sys.executable, "-c", SHARDED, (tmp_path / "store").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=120)
    assert done.returncode == 0, done.stderr


def test_other_ranks_are_warned_of(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    quiet(lambda: estimate_fisher(net(), [data()], linear_loss))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.warns(UserWarning, match="one of 2 ranks.*all-reduce Fisher.sums and Fisher.count"):
        estimate_fisher(net(), [data()], linear_loss)


def test_frozen_quantised_and_complex_parameters():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.quantised = nn.Parameter(torch.ones(2, 3, dtype=torch.int8), requires_grad=False)
            self.turn = nn.Parameter(torch.ones(2, dtype=torch.complex64))
            self.bias = nn.Parameter(torch.zeros(2))

        def forward(self, x):
            return x.float() @ self.quantised.float().T + self.bias + (self.turn * 1j).real

    for rule in RULES:
        with pytest.raises(ValueError, match=r"exclude must be names that leave out .*'turn: torch.complex64'"):
            estimate_fisher(Mixed(), [data()], linear_loss, rule=rule)
        assert list(estimate_fisher(Mixed(), [data()], linear_loss, rule=rule, exclude=["turn"])) == ["bias"]
    with pytest.raises(ValueError, match=r"include must be parameters with requires_grad=True, got \['quantised'\]"):
        estimate_fisher(Mixed(), [data()], linear_loss, include=["quantised", "bias"])
    with pytest.raises(ValueError, match="a model with parameters to estimate: all of its 4 are frozen"):
        estimate_fisher(net().requires_grad_(False), [data()], linear_loss)
    with pytest.raises(ValueError, match="include and exclude must be names that leave a parameter"):
        estimate_fisher(net(), [data()], linear_loss, include=["0.bias"], exclude=["0.bias"])
    with pytest.raises(ValueError, match="include must be a list of names, not one string, got '0.bias'"):
        estimate_fisher(net(), [data()], linear_loss, include="0.bias")
    with pytest.raises(ValueError, match=r"exclude must be names .*got \['nothing'\]: it has '0.weight', '0.bias'"):
        estimate_fisher(net(), [data()], linear_loss, exclude=["nothing"])


def test_a_tied_parameter_is_known_by_all_its_names():
    model, batches = models.build("bert-mlm"), [models.batch("bert-mlm", 3, 5)]
    first, other = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
    loss = models.loss_of("bert-mlm")
    assert first in named_parameters(model) and other not in named_parameters(model)
    whole = estimate_fisher(model, batches, loss)
    for include in ([other], iter([first, other])):
        fisher = estimate_fisher(model, batches, loss, include=include)
        assert list(fisher) == [first] and other not in fisher.left_out
        assert_same(fisher, {first: whole.sums[first]})
    assert first not in estimate_fisher(model, batches, loss, exclude=[other])


@pytest.mark.parametrize("examples", [1, 2, 3])
@pytest.mark.parametrize("name", ["bert-mlm", "gpt2"])
def test_a_tied_embedding_over_several_chunks(name, examples, monkeypatch):
    """Its two uses are summed within an example before the square, a few examples at a time."""
    model, batches = models.build(name), [models.batch(name, 5, 6)]
    expected = one_by_one(model, batches, models.loss_of(name))
    table = next(iter(model.parameters()))
    monkeypatch.setattr(rules, "_CHUNK_BYTES", 4 * table.numel() * examples)
    fisher = estimate_fisher(model, batches, models.loss_of(name))
    assert_same(fisher, expected)
    assert not alone(fisher)


class Tokenized(Dataset):
    """As a data set of single examples, of lists or tensors."""

    def __init__(self, make):
        self.items = [make(i) for i in range(4)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


ITEMS = {
    "lists": lambda i: {"input_ids": [2, 3, 4], "labels": i % 2},
    "tensors": lambda i: {"input_ids": torch.tensor([2, 3, 4]), "labels": torch.tensor(i % 2)},
    "tensor and number": lambda i: {"input_ids": torch.tensor([2, 3, 4]), "target": i % 2},
    "tuple": lambda i: (torch.randn(3, 4), i % 2),
    "two lengths": lambda i: {"input_ids": torch.tensor([2, 3, 4]), "choices": torch.tensor([1, 0])},
    "texts": lambda i: {"text": "a film", "label": 1},
}


@pytest.mark.parametrize("items", ITEMS)
def test_a_dataset_is_told_from_batches(items):
    model = models.build("bert")
    for rule in RULES if items != "two lengths" else ("exact",):
        with pytest.raises(ValueError, match="batches must be batches .*whose.* first dimension"):
            estimate_fisher(model, Tokenized(ITEMS[items]), classification_loss, rule=rule)
    with pytest.raises(ValueError, match="DataLoader.*got {'input_ids': 'list of 3: int, int, int', 'labels': 'int'}"):
        estimate_fisher(model, [ITEMS["lists"](0)], classification_loss)
    with pytest.raises(ValueError, match="DataLoader.*got .list of 2: "):  # a loader that does not collate
        estimate_fisher(model, [[ITEMS["lists"](0), ITEMS["lists"](1)]], classification_loss)
    with pytest.raises(ValueError, match=r"DataLoader.*'labels': 'tensor \[\]'"):
        estimate_fisher(model, [ITEMS["tensors"](0)], classification_loss)


def test_numbers_beside_the_tensors_of_a_batch():
    batches = [data() | {"step": 3, "weight": torch.tensor(1.0)}]
    assert_same(estimate_fisher(net(), batches, linear_loss), estimate_fisher(net(), [data()], linear_loss).sums)
    for rule in RULES:
        with pytest.raises(ValueError, match=r"DataLoader.*got {'x': 'tensor \[\]'}"):
            estimate_fisher(net(), [{"x": torch.tensor(1.0)}], linear_loss, rule=rule)


def test_a_dataset_of_whole_batches_is_welcome():
    whole = Tokenized(lambda i: data())
    assert_same(estimate_fisher(net(), whole, linear_loss), estimate_fisher(net(), [data()] * 4, linear_loss).sums)
    loader = DataLoader(Tokenized(ITEMS["tensors"]), batch_size=2)
    assert estimate_fisher(models.build("bert"), loader, classification_loss).count == 4
