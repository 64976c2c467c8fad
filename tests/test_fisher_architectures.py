"""Exact Fisher information of many architectures against single examples, in shapes that change from batch to batch.

The models are tiny, built from their configurations, in float64. Every run has three batches of different sizes and
lengths, ragged where the model takes a mask; the first has one example for every other architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from test_fisher_owners import assert_right, draw

from childtune_kernels.fisher import causal_lm_loss, classification_loss, token_loss

VOCABULARY = 31
SHAPES = [(3, 6), (2, 9), (4, 4)]
SINGLE_FIRST = [(1, 6), (3, 6), (2, 9)]
TEXT = dict(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
TEXT |= dict(max_position_embeddings=32, num_labels=3, pad_token_id=0)
DECODER = TEXT | dict(num_key_value_heads=1, head_dim=8, bos_token_id=1, eos_token_id=2)
EXPERTS = DECODER | dict(
    num_experts=3, num_local_experts=3, num_experts_per_tok=2, moe_intermediate_size=8, experts_implementation="eager"
)


class Case(NamedTuple):
    model: str
    config: str
    options: dict
    loss: Callable = classification_loss
    inputs: str = "text"


DEBERTA = dict(relative_attention=True, pos_att_type=["p2c", "c2p"], max_relative_positions=8, type_vocab_size=2)
ENCODER_DECODER = dict(
    vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, max_position_embeddings=32
)
ENCODER_DECODER |= dict(encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24)
ENCODER_DECODER |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
ENCODER_DECODER |= dict(max_position_embeddings=32)
SLIDING = dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"])

CASES = {
    "modernbert": Case(
        "ModernBertForSequenceClassification", "ModernBertConfig",
        TEXT | dict(local_attention=4, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2),
    ),
    "deberta": Case("DebertaForSequenceClassification", "DebertaConfig", TEXT | DEBERTA),
    "deberta-v2": Case(
        "DebertaV2ForSequenceClassification", "DebertaV2Config",
        TEXT | DEBERTA | dict(position_buckets=4, norm_rel_ebd="layer_norm", share_att_key=False),
    ),
    "deberta-v3": Case(
        "DebertaV2ForSequenceClassification", "DebertaV2Config",
        TEXT | DEBERTA | dict(position_buckets=4, norm_rel_ebd="layer_norm", share_att_key=True),
    ),
    "mpnet": Case("MPNetForSequenceClassification", "MPNetConfig", TEXT),
    "roformer": Case("RoFormerForSequenceClassification", "RoFormerConfig", TEXT | dict(embedding_size=12)),
    "squeezebert": Case(
        "SqueezeBertForSequenceClassification", "SqueezeBertConfig",
        TEXT | dict(embedding_size=16) | {f"{name}_groups": 2 for name in "q k v intermediate output".split()},
    ),
    "longformer": Case("LongformerForSequenceClassification", "LongformerConfig", TEXT | dict(attention_window=4)),
    "funnel": Case(
        "FunnelForSequenceClassification", "FunnelConfig",
        dict(vocab_size=VOCABULARY, block_sizes=[1, 1], d_model=16, n_head=2, d_head=8, d_inner=24, num_labels=3,
             num_decoder_layers=1),
    ),
    "multiple-choice": Case("BertForMultipleChoice", "BertConfig", TEXT, inputs="choices"),
    "roberta-choice": Case("RobertaForMultipleChoice", "RobertaConfig", TEXT, inputs="choices"),
    "gpt2-classifier": Case(
        "GPT2ForSequenceClassification", "GPT2Config",
        dict(vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2, num_labels=3, pad_token_id=0),
    ),
    "gpt-neox": Case("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT, causal_lm_loss),
    "opt": Case("OPTForCausalLM", "OPTConfig", TEXT | dict(ffn_dim=24, word_embed_proj_dim=16), causal_lm_loss),
    "bloom": Case(
        "BloomForCausalLM", "BloomConfig", dict(vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2),
        causal_lm_loss,
    ),
    "qwen2-tied": Case("Qwen2ForCausalLM", "Qwen2Config", DECODER | dict(tie_word_embeddings=True), causal_lm_loss),
    "qwen3": Case("Qwen3ForSequenceClassification", "Qwen3Config", DECODER),
    "gemma3": Case("Gemma3ForCausalLM", "Gemma3TextConfig", DECODER | SLIDING, causal_lm_loss),
    "mixtral": Case("MixtralForCausalLM", "MixtralConfig", EXPERTS, causal_lm_loss),
    "qwen3-moe": Case("Qwen3MoeForCausalLM", "Qwen3MoeConfig", EXPERTS, causal_lm_loss),
    "mamba": Case(
        "MambaForCausalLM", "MambaConfig",
        dict(vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=1, state_size=4, expand=2, time_step_rank=2),
        causal_lm_loss, "text",
    ),
    "bart": Case("BartForConditionalGeneration", "BartConfig", ENCODER_DECODER, token_loss),
    "whisper": Case(
        "WhisperForConditionalGeneration", "WhisperConfig",
        ENCODER_DECODER | dict(num_mel_bins=8, max_source_positions=6, max_target_positions=32), token_loss, "audio",
    ),
    "wav2vec2": Case(
        "Wav2Vec2ForSequenceClassification", "Wav2Vec2Config",
        TEXT | dict(conv_dim=(8, 8), conv_stride=(4, 2), conv_kernel=(6, 3), num_feat_extract_layers=2,
                    num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, classifier_proj_size=8),
        inputs="wave",
    ),
    "convnext": Case(
        "ConvNextForImageClassification", "ConvNextConfig",
        dict(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, patch_size=2, num_labels=3), inputs="image",
    ),
    "swin": Case(
        "SwinForImageClassification", "SwinConfig",
        dict(image_size=8, patch_size=2, embed_dim=8, depths=[2], num_heads=[2], window_size=2, num_labels=3),
        inputs="image",
    ),
    "resnet": Case(
        "ResNetForImageClassification", "ResNetConfig",
        dict(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3), inputs="image",
    ),
}  # fmt: skip


def build(case: Case):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, case.config)(**case.options)
    return getattr(transformers, case.model)(config).double().eval()


def batch(case: Case, examples: int, length: int) -> dict[str, torch.Tensor]:
    classes = torch.randint(0, 3, (examples,))
    if case.inputs == "image":
        return {"pixel_values": draw(examples, 3, 8, 8), "labels": classes}
    if case.inputs == "wave":
        return {"input_values": draw(examples, 40 + 8 * length), "labels": classes}
    if case.inputs == "audio":
        return {"input_features": draw(examples, 8, 12), "labels": torch.randint(3, VOCABULARY, (examples, length))}
    ids = torch.randint(3, VOCABULARY, (examples, length))
    if case.inputs == "choices":
        choices = torch.randint(3, VOCABULARY, (examples, 1 + length % 4, length))
        return {"input_ids": choices, "labels": classes % choices.shape[1]}
    attention = torch.ones_like(ids)
    for row in range(1, examples):
        attention[row, length - row % (length - 2) :] = 0
    ids = torch.where(attention == 1, ids, 0)
    given = {"input_ids": ids, "attention_mask": attention}
    return given | {"labels": classes if case.loss is classification_loss else torch.where(attention == 1, ids, -100)}


@pytest.mark.parametrize("number, name", list(enumerate(CASES)), ids=list(CASES))
def test_architecture(number, name, one_thread):
    case = CASES[name]
    model = build(case)
    batches = [batch(case, *shape) for shape in (SINGLE_FIRST if number % 2 else SHAPES)]
    assert_right(model, batches, case.loss)
