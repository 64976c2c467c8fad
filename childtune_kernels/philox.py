"""The mask stream, version 1: which weights F keeps, as a specification and its numpy/torch realisation.

A keep-bit depends on (seed, parameter name, step, element index) and on nothing else::

    uid  = first 8 bytes, little endian, of blake2b(name, digest_size=8)
    key  = (seed XOR uid) as two 32-bit words, low first
    ctr  = (low32(e >> 2), high32(e >> 2), step, domain)      e = row-major index in the full parameter
    word = philox4x32-10(ctr, key)[e & 3]
    keep <=> word < floor(p * 2**32)

Philox is the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
Everything here works on int64 numpy arrays and on int64 torch tensors alike: a 64-bit product that wraps has the
right low 64 bits, and masking after a shift removes the sign.
"""

from __future__ import annotations

import hashlib
import math
from typing import TypeVar

import numpy as np
import torch

STREAM_VERSION = 1

# The fourth counter word keeps independent uses of one key apart.
GRADIENT_MASK, STOCHASTIC_ROUNDING, MIXOUT, RANDOM_CHILD = range(4)

# Random123's published known answers: (counter, key, output).
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)

_LOW32 = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

Ints = TypeVar("Ints", np.ndarray, torch.Tensor)


def philox4x32_10(counter: tuple[Ints, ...], key: tuple[int, int]) -> tuple[Ints, Ints, Ints, Ints]:
    """Run ten Philox rounds.

    Args:
        counter: four arrays (int64, values below 2**32) that broadcast together.
        key: two 32-bit words, low first.

    Returns:
        Four arrays (int64, values below 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = (product1 >> 32 & _LOW32) ^ c1 ^ k0, (product0 >> 32 & _LOW32) ^ c3 ^ k1
        c1, c3 = product1 & _LOW32, product0 & _LOW32
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW32, (k1 + _KEY_STEPS[1]) & _LOW32
    return c0, c1, c2, c3


def uid(name: str) -> int:
    """Return the 64-bit identity of a parameter name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def stream_key(seed: int, name: str) -> int:
    """Return ``seed XOR uid(name)`` as a signed 64-bit integer, the form that ops take.

    Raises:
        ValueError: ``seed`` is not an integer in [0, 2**64).
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**64:
        raise ValueError(f"seed must be an integer in [0, 2**64), got {seed!r}")
    return as_signed(seed ^ uid(name), 64)


def as_signed(word: int, bits: int) -> int:
    """Reinterpret an unsigned ``bits``-bit integer as two's complement."""
    return word - (1 << bits) if word >> (bits - 1) else word


def keep_threshold(p: float) -> int:
    """Return ``floor(p * 2**32)``: a word below it is kept. Exact, since the scale is a power of two."""
    return math.floor(p * 2**32)


def words(elements: Ints, key: int, step: int, domain: int) -> Ints:
    """Return the random words of the given elements: 32 bits each, as int64, shaped like ``elements``.

    Args:
        elements: row-major element indices in the full parameter, int64, any shape.
        key: from `stream_key`.
        step: the parameter's own step count, the first step being 1.
        domain: which use of the stream.
    """
    quads, lanes = elements >> 2, elements & 3
    zeros = quads * 0
    counter = (quads & _LOW32, quads >> 32 & _LOW32, zeros + step, zeros + domain)
    drawn = philox4x32_10(counter, (key & _LOW32, key >> 32 & _LOW32))
    return sum(word * (lanes == lane) for lane, word in enumerate(drawn))


def keep_bits(elements: Ints, key: int, step: int, p: float, domain: int = GRADIENT_MASK) -> Ints:
    """Return the keep-bits of the given elements, bool, shaped like ``elements``.

    Args:
        elements, key, step, domain: see `words`.
        p: share of elements kept, in (0, 1].
    """
    return words(elements, key, step, domain) < keep_threshold(p)


def mask_at(
    name: str, shape: tuple[int, ...], *, seed: int, step: int, p: float, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Regenerate F's gradient mask of one parameter at one step, bool, of the parameter's shape."""
    elements = torch.arange(math.prod(shape), dtype=torch.int64, device=device)
    return keep_bits(elements, stream_key(seed, name), step, p).view(shape)
