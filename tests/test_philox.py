"""The mask stream: known answers, an independent generator, statistics; every implementation gives the same bits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import NormalDist

import numpy as np
import oracles
import pytest
import torch
from cases import hyper_row

from childtune_kernels import ops, philox

_FILE = json.loads((Path(__file__).parent / "data" / "mask_stream_v1.json").read_text(encoding="utf-8"))
VECTORS = [
    pytest.param(
        {**v, "seed": int(v["seed"], 16), "first": int(v["first"], 16), "p": float.fromhex(v["p"])},
        id=f"{i}-{v['seed']}-{v['step']}-{float.fromhex(v['p']):g}-{v['first']}",
    )
    for i, v in enumerate(_FILE["vectors"])
]

# Fixed seeds make the statistics below deterministic; for a fresh seed each would fail this often by chance.
FALSE_ALARM = 1e-6


def z_bound(tests: int) -> float:
    """Two-sided bound that ``tests`` standard normal values together exceed with probability FALSE_ALARM."""
    return NormalDist().inv_cdf(1 - FALSE_ALARM / (2 * tests))


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_random123_known_answers(kind):
    as_array = np.array if kind == "numpy" else torch.tensor
    counters = as_array([counter for counter, _, _ in philox.KNOWN_ANSWERS])
    for row, (_, key, expected) in enumerate(philox.KNOWN_ANSWERS):
        words = philox.philox4x32_10(tuple(counters[:, lane] for lane in range(4)), key)
        assert tuple(int(word[row]) for word in words) == expected


def test_the_vectors_are_of_this_stream_version():
    assert _FILE["stream_version"] == philox.STREAM_VERSION == 1
    assert len(VECTORS) >= 30


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("v", VECTORS)
def test_keep_bits_give_the_vectors(v, kind):
    assert philox.uid(v["name"]) == int(v["uid"], 16)
    elements = np.arange(len(v["keep"]), dtype=np.int64) + v["first"]
    elements = torch.from_numpy(elements) if kind == "torch" else elements
    key = philox.stream_key(v["seed"], v["name"])
    bits = philox.keep_bits(elements, key, v["step"], v["p"], v["domain"])
    assert "".join(str(int(bit)) for bit in bits) == v["keep"]


@pytest.mark.parametrize("v", VECTORS)
def test_the_vectors_follow_from_the_specification(v):
    both = philox.uid(v["name"]) ^ v["seed"]
    for i, (word, keep) in enumerate(zip(v["words"], v["keep"], strict=False)):
        quad, lane = divmod(v["first"] + i, 4)
        counter = (quad % 2**32, quad >> 32, v["step"], v["domain"])
        assert oracles.philox(counter, (both % 2**32, both >> 32))[lane] == int(word, 16)
        assert (int(word, 16) < math.floor(v["p"] * 2**32)) == (keep == "1")


@pytest.mark.parametrize("v", VECTORS)
def test_every_implementation_gives_the_vectors(v, place):
    numel, key = len(v["keep"]), philox.stream_key(v["seed"], v["name"])
    words = place.kernels.bernoulli_bits(
        numel, key, v["step"], v["p"], v["domain"], v["first"], torch.device(place.device)
    )
    assert words.dtype == torch.int32 and words.shape == ((numel + 31) // 32,) and words.device.type == place.device
    bits = "".join(f"{word % 2**32:032b}"[::-1] for word in words.tolist())
    assert bits[:numel] == v["keep"]
    assert "1" not in bits[numel:], "spare bits must be 0"


@pytest.mark.parametrize(
    "p, threshold",
    [
        (2.0**-32, 1),
        (1e-9, 4),
        (0.1, 429496729),
        (0.3, 1288490188),
        (0.5, 2**31),
        (1 - 2.0**-33, 2**32 - 1),
        (1.0, 2**32),
    ],
)
def test_the_threshold_is_rounded_down(p, threshold):
    assert philox.keep_threshold(p) == threshold


@pytest.mark.parametrize("element", [0, 1, 2, 3, 29])
def test_the_threshold_is_exact_everywhere(element, place):
    """p = (word + x) / 2**32 is exact in fp64 and drops the element up to x < 1: no fp32, no rounding on the way."""
    key, n, device = philox.stream_key(7, "w"), 32, torch.device(place.device)
    quad, lane = divmod(element, 4)
    word = oracles.philox((quad, 0, 1, 0), (key % 2**32, key >> 32 & 0xFFFFFFFF))[lane]
    for x, kept in ((0.0, False), (0.5, False), (1.0, True)):
        p = (word + x) / 2**32
        words = place.kernels.bernoulli_bits(n, key, 1, p, philox.GRADIENT_MASK, 0, device)
        assert ops.unpack_bits(words, n)[element].item() is kept
        weight, moment, square = (torch.zeros(n, device=device) for _ in range(3))
        hyper = torch.tensor([hyper_row(reserve_p=p, beta1=0.0)], dtype=torch.float64)
        step = torch.zeros((), dtype=torch.float64, device=device)
        lists = [weight], [torch.ones_like(weight)], [moment], [square], [step]
        place.kernels.update_(ops.Update(*lists, hyper, mask_keys=[key]))
        assert (moment[element].item() != 0) is kept


@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("numel", [0, 1, 2, 3, 4, 31, 32, 33, 1023, 1024, 1025, 70_001])
def test_every_implementation_covers_every_size(numel, p, place):
    key = philox.stream_key(7, "w")
    expected = philox.keep_bits(np.arange(numel, dtype=np.int64), key, 3, p)
    words = place.kernels.bernoulli_bits(numel, key, 3, p, philox.GRADIENT_MASK, 0, torch.device(place.device))
    assert torch.equal(ops.unpack_bits(words, numel).cpu(), torch.from_numpy(expected))


@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 7), (2, 3, 5)], ids=str)
def test_mask_at_is_row_major(shape, device):
    mask = philox.mask_at("w", shape, seed=9, step=4, p=0.4, device=device)
    flat = philox.keep_bits(np.arange(math.prod(shape), dtype=np.int64), philox.stream_key(9, "w"), 4, 0.4)
    assert mask.shape == shape and mask.dtype == torch.bool and mask.device.type == device
    assert torch.equal(mask.cpu(), torch.from_numpy(flat).view(shape))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.3, 0.5, 0.9])
def test_keep_rate_by_chi_square(p):
    """64 blocks of 4096 elements, a chi-square of 64 degrees, by its Wilson-Hilferty normal approximation."""
    blocks, size = 64, 4096
    keep = philox.keep_bits(np.arange(blocks * size, dtype=np.int64), philox.stream_key(1, "w"), 1, p)
    counts = keep.reshape(blocks, size).sum(1)
    chi2 = ((counts - size * p) ** 2 / (size * p * (1 - p))).sum()
    z = ((chi2 / blocks) ** (1 / 3) - (1 - 2 / (9 * blocks))) / math.sqrt(2 / (9 * blocks))
    assert abs(z) < z_bound(1)


def _standardised(p, *, elements=None, name="w", seed=1, step=1, domain=0, n=1 << 16):
    elements = np.arange(n, dtype=np.int64) if elements is None else elements
    return (philox.keep_bits(elements, philox.stream_key(seed, name), step, p, domain) - p) / math.sqrt(p * (1 - p))


PAIRS = {
    "steps": ({"step": 1}, {"step": 2}),
    "far steps": ({"step": 1}, {"step": 257}),
    "names": ({"name": "layer.0.weight"}, {"name": "layer.1.weight"}),
    "positions": ({"name": "0"}, {"name": "1"}),
    "seeds": ({"seed": 0}, {"seed": 1}),
    "seed halves": ({"seed": 1}, {"seed": 2**32}),
    "domains": ({"domain": 0}, {"domain": 3}),
    "neighbours": ({}, {"elements": np.arange(1, (1 << 16) + 1)}),
    "next quad": ({}, {"elements": np.arange(4, (1 << 16) + 4)}),
    "next row": ({}, {"elements": np.arange(1024, (1 << 16) + 1024)}),
    "high counter word": ({}, {"elements": np.arange(1 << 16) + (1 << 34)}),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_are_uncorrelated(pair, p):
    a, b = (_standardised(p, **kwargs) for kwargs in PAIRS[pair])
    assert not np.array_equal(a, b)
    assert abs((a * b).mean()) * math.sqrt(a.size) < z_bound(2 * len(PAIRS))


def test_lanes_are_uncorrelated():
    lanes = _standardised(0.3).reshape(-1, 4)
    z = lanes.T @ lanes / math.sqrt(len(lanes))
    assert np.abs(z[np.triu_indices(4, 1)]).max() < z_bound(6)


def test_each_input_of_the_stream_matters():
    """Nothing else does: equal inputs give equal bits wherever the elements lie in the call."""
    base = dict(name="w", seed=5, step=3, domain=0, n=256)
    for change in ({"name": "v"}, {"seed": 6}, {"seed": 5 + 2**40}, {"step": 4}, {"domain": 1}):
        assert not np.array_equal(_standardised(0.5, **base), _standardised(0.5, **{**base, **change}))
    part = _standardised(0.5, **{**base, "elements": np.arange(100, 164)})
    assert np.array_equal(part, _standardised(0.5, **base)[100:164])


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, "0", None])
def test_bad_seeds_are_refused(seed):
    with pytest.raises(ValueError, match=r"seed must be an integer in \[0, 2\*\*64\), got"):
        philox.stream_key(seed, "w")
