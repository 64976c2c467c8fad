"""Parameter-shape lists of models that are fine-tuned in practice, for benchmarks."""

from __future__ import annotations


def bert_large() -> list[tuple[int, ...]]:
    """BERT-large with a two-class head: 393 tensors, 335 M parameters."""
    d, layers, vocabulary = 1024, 24, 30522
    norm = [(d,), (d,)]
    attention = [(d, d), (d,)] * 4 + norm
    feed_forward = [(4 * d, d), (4 * d,), (d, 4 * d), (d,)] + norm
    embeddings = [(vocabulary, d), (512, d), (2, d)] + norm
    return embeddings + (attention + feed_forward) * layers + [(d, d), (d,), (2, d), (2,)]


def llama_7b() -> list[tuple[int, ...]]:
    """A 7B Llama: 291 tensors, 6.7 G parameters."""
    d, ff, layers, vocabulary = 4096, 11008, 32, 32000
    layer = [(d, d)] * 4 + [(ff, d)] * 2 + [(d, ff)] + [(d,)] * 2
    return [(vocabulary, d)] + layer * layers + [(d,), (vocabulary, d)]


def bert_small() -> list[tuple[int, ...]]:
    """A quarter of BERT-large's layers without the vocabulary: 97 tensors, 76 M parameters, for a CPU."""
    return bert_large()[5 : 5 + 16 * 6] + [(2, 1024)]


def bert_layer() -> list[tuple[int, ...]]:
    """One layer of BERT-large: 16 tensors, 13 M parameters."""
    return bert_large()[5 : 5 + 16]


SHAPES = {"bert-large": bert_large, "llama-7b": llama_7b, "bert-small": bert_small, "bert-layer": bert_layer}
