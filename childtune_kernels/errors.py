"""The form of every refusal: it names the argument, what was expected and what came."""

from __future__ import annotations

from typing import Any


def require(name: str, got: Any, ok: bool, expected: str) -> None:
    """Raise ValueError, naming the argument, what was expected and what came, unless ``ok``."""
    if not ok:
        raise ValueError(f"{name} must be {expected}, got {got!r}")
