"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Give the path of a file to write; once it is written and on the disk, it takes the place of ``path``.

    Killed at any moment, a process leaves the old file, or the new one, under that name::

        with replacing("run.pt") as partial:
            torch.save(optimizer.state_dict(), partial)
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
