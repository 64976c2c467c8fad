"""What sub-commands print alike, and the two ways in which they fail."""

from __future__ import annotations

from collections.abc import Sequence


class Refused(Exception):
    """What was given cannot be used; nothing has been done yet. Exit code 2."""


class Failed(Exception):
    """What was begun cannot be finished. Exit code 1."""


def one_line(text: object) -> str:
    """Return a text without its line breaks."""
    return " ".join(str(text).split())


def brief(error: Exception, most: int = 500) -> str:
    """Return in one line what an error of others says, or its beginning: some are pages long."""
    line = one_line(error) or type(error).__name__
    return line if len(line) <= most else f"{line[:most]} ..."


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells, the header first, as lines of a Markdown table that is also readable as it is."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * width for width in widths]
    return [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in (rows[0], rule, *rows[1:])]


def size(nbytes: int) -> str:
    """Return a number of bytes in the unit in which it has one to three digits before the point."""
    for unit, bound in (("B", 1e3), ("kB", 1e6), ("MB", 1e9), ("GB", 1e12)):
        if nbytes < bound:
            return f"{nbytes / bound * 1e3:.{0 if unit == 'B' else 1}f} {unit}"
    return f"{nbytes / 1e12:,.1f} TB"
