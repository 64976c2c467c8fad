"""What sub-commands print and parse alike."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells, the header first, as lines of a Markdown table that is also readable as it is."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * width for width in widths]
    return [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in (rows[0], rule, *rows[1:])]


def output_file(suffix: str) -> Callable[[str], Path]:
    """Return the parser of a flag that names a file to write."""

    def parse(text: str) -> Path:
        path = Path(text)
        if path.suffix != suffix or not path.absolute().parent.is_dir():
            raise argparse.ArgumentTypeError(f"expected a {suffix} file in a folder that exists, got {text!r}")
        return path

    return parse
