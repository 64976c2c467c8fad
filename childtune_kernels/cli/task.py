"""The examples that `childtune fisher` reads, and what must be right about them before a model is loaded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from .inputs import read_text
from .text import Refused

KEYS = ("text", "text_pair", "label")
_LARGEST = 3.4e38  # float32's, nearly


def read_task(path: Path) -> list[dict[str, Any]]:
    """Read the examples; each also gets its ``line``.

    Raises:
        Refused: the file cannot be read or holds none, or naming the line that is no JSON object, has another key, no
            text, a label that is no number, or has a label where another line has none.
    """
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            rows.append(_row(f"{path}, line {number}", line) | {"line": number})
            if ("label" in rows[-1]) != ("label" in rows[0]):
                raise Refused(f"{path}, line {number} must have a label like the first line, or none like it")
    if not rows:
        raise Refused(f"{path} must hold at least one example, got none")
    return rows


def _row(where: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Refused(f"{where} must be a JSON object, got {line[:40]!r}: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise Refused(f'{where} must be a JSON object with a "text", got {line[:40]!r}')
    if unknown := [key for key in row if key not in KEYS]:
        raise Refused(f"{where} must have no keys but {', '.join(KEYS)}, got {unknown[0]!r}")
    if not row["text"].strip():
        raise Refused(f"{where} must have a text that is not empty")
    if not isinstance(row.get("text_pair"), str | None):
        raise Refused(f"{where} must have a text as text_pair, got {row['text_pair']!r}")
    if "label" in row and not _is_number(row["label"]):
        raise Refused(f"{where}: labels must be class numbers from 0 on, or numbers, got {row['label']!r}")
    return row


def _is_number(label: Any) -> bool:
    if isinstance(label, bool) or not isinstance(label, int | float):
        return False
    return math.isfinite(label) and abs(label) <= _LARGEST if isinstance(label, float) else abs(label) <= _LARGEST


def head_of(rows: list[dict[str, Any]]) -> str:
    """Return the head that labels ask for."""
    if "label" not in rows[0]:
        return "causal-lm"
    return "regression" if any(isinstance(row["label"], float) for row in rows) else "classification"


def check_labels(path: Path, rows: list[dict[str, Any]], head: str) -> None:
    """Refuse labels that a head cannot take; a causal-lm does not read them."""
    if head == "causal-lm":
        return
    if "label" not in rows[0]:
        raise Refused(f'{path} must have a "label" in every line for --head {head}, got none')
    for row in rows if head == "classification" else ():
        label = row["label"]
        if not isinstance(label, int) or label < 0:
            where = f"{path}, line {row['line']}"
            raise Refused(f"{where}: labels must be class numbers from 0 on, got {label!r} (--head regression?)")


def classes_of(path: Path, rows: list[dict[str, Any]], trained: int | None) -> int:
    """Return how many classes the head has: the checkpoint's own where it has one, else what the labels need.

    Args:
        path: the task's file.
        rows: the examples, with labels that `check_labels` has seen.
        trained: the number of outputs of the checkpoint's own head, None where it has none.

    Raises:
        Refused: there are more classes than the checkpoint's head has, or than a new head can learn.
    """
    last = max(rows, key=lambda row: row["label"])
    classes, occur = max(2, 1 + last["label"]), len({row["label"] for row in rows})
    where = f"{path}, line {last['line']}: label {last['label']}"
    if trained is not None and classes > trained:
        raise Refused(f"{where} needs {classes:,} classes, but the checkpoint's own head has {trained} outputs")
    if trained is None and classes > max(100, 10 * occur):
        hint = "labels are class numbers: number the classes from 0 on, or write 3.0 for a regression"
        raise Refused(f"{where} needs a head of {classes:,} classes, of which {occur} occur; {hint}")
    return classes if trained is None else trained
