"""Writes mask_stream_v1.json: known answers of the mask stream, from its specification in Python integers alone.

The file is a contract: stream version 1 never changes, so this is run once, and again only for a version 2.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from oracles import philox  # noqa: E402

COUNT = 72  # elements a case: two whole words of bits and a tail of eight
BASE = dict(seed=0, name="encoder.layer.0.attention.self.query.weight", step=1, p=0.3, domain=0, first=0)
VARIED = [
    {},
    *({"seed": seed} for seed in (1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1)),
    *({"name": name} for name in ("", "0", "10", "classifier.bias", "größe.重み.🧠")),
    *({"step": step} for step in (2, 16, 256, 257, 2**24 - 1)),
    *({"p": p} for p in (2.0**-32, 1e-9, 0.1, 0.5, 0.9, 1 - 2.0**-32, 1 - 2.0**-33, 1.0)),
    *({"domain": domain} for domain in (1, 2, 3)),
    *({"first": first} for first in (4, 2**31 - 36, 2**32 - 36, 2**33, 2**34 - 36, 2**34, 2**40 + 4)),
    dict(seed=2**64 - 1, name="größe.重み.🧠", step=2**24 - 1, p=0.5, first=2**34 - 36, domain=3),
    dict(seed=0x0123456789ABCDEF, name="7", step=1000, p=0.1, first=2**36 + 2**20),
]


def case(*, seed: int, name: str, step: int, p: float, domain: int, first: int) -> dict:
    uid = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    key = ((seed ^ uid) % 2**32, (seed ^ uid) // 2**32)
    words = []
    for element in range(first, first + COUNT):
        quad = element // 4
        words.append(philox((quad % 2**32, quad // 2**32, step, domain), key)[element % 4])
    keep = "".join(str(int(word < math.floor(p * 2**32))) for word in words)
    # As strings: JSON readers elsewhere hold integers in doubles.
    return dict(
        seed=hex(seed), name=name, uid=hex(uid), step=step, p=p.hex(), domain=domain, first=hex(first),
        words=[f"{word:08x}" for word in words[:8]], keep=keep,
    )  # fmt: skip


def main() -> None:
    vectors = [case(**{**BASE, **varied}) for varied in VARIED]
    content = json.dumps(dict(stream_version=1, vectors=vectors), indent=1, ensure_ascii=False)
    (HERE / "mask_stream_v1.json").write_text(content + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
