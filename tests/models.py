"""Tiny models of every family that the paper fine-tunes and some it does not, in float64, and batches for them."""

from __future__ import annotations

import torch
from torch import nn

from childtune_kernels.fisher import causal_lm_loss, classification_loss, token_loss

VOCABULARY = 37


def _bert_like(**more) -> dict:
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3)
    return sizes | dict(vocab_size=VOCABULARY, max_position_embeddings=24) | more


def _build() -> dict:
    import transformers as t

    xlnet = dict(vocab_size=VOCABULARY, d_model=16, n_layer=2, n_head=2, d_inner=24, num_labels=3)
    tokens = dict(bos_token_id=1, eos_token_id=2)
    gpt2 = dict(vocab_size=VOCABULARY, n_positions=24, n_embd=16, n_layer=2, n_head=2)
    llama = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    llama |= dict(intermediate_size=24, vocab_size=VOCABULARY, max_position_embeddings=24)
    t5 = dict(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    vit = _bert_like(image_size=8, patch_size=4)
    albert = _bert_like(embedding_size=12)
    return {
        "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**_bert_like())),
        "bert-mlm": lambda: t.BertForMaskedLM(t.BertConfig(**_bert_like())),  # the head is tied to the embedding
        "roberta": lambda: t.RobertaForSequenceClassification(t.RobertaConfig(**_bert_like(pad_token_id=1))),
        "electra": lambda: t.ElectraForSequenceClassification(t.ElectraConfig(**_bert_like(embedding_size=12))),
        "albert": lambda: t.AlbertForSequenceClassification(t.AlbertConfig(**albert)),  # both layers are one
        "xlnet": lambda: t.XLNetForSequenceClassification(t.XLNetConfig(**xlnet)),
        "xlnet-types": lambda: t.XLNetForSequenceClassification(t.XLNetConfig(**xlnet)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**gpt2, **tokens)),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**llama)),
        "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(**t5)),
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**{k: v for k, v in vit.items() if k != "vocab_size"})),
    }


NAMES = "bert bert-mlm roberta electra albert xlnet xlnet-types gpt2 llama t5 vit".split()
LOSSES = {"gpt2": causal_lm_loss, "llama": causal_lm_loss, "t5": token_loss, "bert-mlm": token_loss}


def build(name: str) -> nn.Module:
    """Return the model, float64, in evaluation mode."""
    torch.manual_seed(0)
    return _build()[name]().double().eval()


def loss_of(name: str):
    return LOSSES.get(name, classification_loss)


def batch(name: str, examples: int, length: int, left_padding: bool = False) -> dict[str, torch.Tensor]:
    """Return a batch of ragged sequences; ids repeat within examples, and labels of padding are ignored."""
    draw = torch.Generator().manual_seed(100 * examples + length)
    classes = torch.randint(0, 3, (examples,), generator=draw)
    if name == "vit":
        return {"pixel_values": torch.randn(examples, 3, 8, 8, generator=draw).double(), "labels": classes}
    ids = torch.randint(2, VOCABULARY, (examples, length), generator=draw)
    ids[:, 1] = ids[:, 0]
    attention = torch.ones_like(ids)
    for row in range(1, examples):
        padding = row % (length - 2)
        attention[row, length - padding :] = 0
        ids[row, length - padding :] = 1 if name == "roberta" else 0
    if left_padding:
        ids, attention = ids.flip(1), attention.flip(1)
    inputs = {"input_ids": ids, "attention_mask": attention}
    if name == "xlnet-types":
        inputs["token_type_ids"] = torch.randint(0, 2, ids.shape, generator=draw)
    return inputs | {"labels": torch.where(attention == 1, ids, -100) if name in LOSSES else classes}
