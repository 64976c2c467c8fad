"""What sub-commands take, refused before they start where it cannot be used, and how they keep what they made."""

from __future__ import annotations

import argparse
import importlib.util
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ..files import replacing
from .text import Failed, Refused, brief

# ---- types of flags -------------------------------------------------------------------------------------------------


def output_file(suffix: str) -> Callable[[str], Path]:
    """Return the parser of a flag that names a file to write."""

    def parse(text: str) -> Path:
        path = Path(text)
        if path.suffix != suffix or not path.absolute().parent.is_dir():
            raise argparse.ArgumentTypeError(f"expected a {suffix} file in a folder that exists, got {text!r}")
        try:
            _try_to_write(path)
        except OSError as error:
            raise argparse.ArgumentTypeError(f"expected a file that can be written, got {text!r}: {error}") from error
        return path

    return parse


class _Writable(Exception):
    """Ends the attempt of `_try_to_write`."""


def _try_to_write(path: Path) -> None:
    """Write to a path as it will be written, but leave nothing behind and what is there as it is."""
    if path.exists():
        open(path, "r+b").close()  # not a folder, not read-only
    try:
        with replacing(path) as partial:
            partial.touch()
            raise _Writable
    except _Writable:
        pass


def whole(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """Return the parser of a flag that is a whole number."""

    def parse(text: str) -> int:
        if not (text.isdecimal() and len(text) < 20 and least <= int(text) <= most):
            above = f" and at most {most}" if text.isdecimal() and int(text[:20]) >= least else ""
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}{above}, got {text!r}")
        return int(text)

    return parse


def share(text: str) -> float:
    """Parse a flag that is a share of the weights."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {text}")
    return value


def device(text: str) -> str:
    """Parse a flag that is a device which torch sees; "auto" becomes "cuda" where there is one, else "cpu"."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "auto":
        return "cuda" if count else "cpu"
    match = re.fullmatch(r"cuda(?::(\d{1,4}))?", text, re.ASCII)
    if text != "cpu" and not match:
        raise argparse.ArgumentTypeError(f"expected auto, cpu or cuda, got {text!r}")
    if match and int(match[1] or 0) >= count:
        seen = f"{count} CUDA device{'s' * (count > 1)}" if count else "no CUDA device"
        raise argparse.ArgumentTypeError(f"expected a device that torch sees, got {text!r}: torch sees {seen}")
    return text


# ---- checks before the work -----------------------------------------------------------------------------------------


def require_packages(packages: list[str], install: str, needs: str = "this needs") -> None:
    """Stop where an optional package is missing; ``install`` is what pip is to be given."""
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        raise Failed(f"{needs} {', '.join(missing)}: pip install {install}")


def require_apart(outputs: Mapping[str, Path | None], inputs: list[Path]) -> None:
    """Refuse to write two results to one file, or a result over what is read."""
    taken = {path.resolve(): "a file that is read" for path in inputs}
    for flag, path in outputs.items():
        if path is None:
            continue
        if other := taken.get(path.resolve()):
            raise Refused(f"{flag} must be a file of its own, got {path}, which is {other}")
        taken[path.resolve()] = f"that of {flag}"


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turn whatever reading a file raises into a refusal that names it."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        what = brief(error)
        raise Refused(what if str(path) in what else f"{path} cannot be read: {what}") from error


def read_text(path: Path) -> str:
    """Return a file's text, without the mark that some editors put at its beginning."""
    with refusing(path):
        return path.read_text(encoding="utf-8-sig")


def model_folder(path: Path, flag: str) -> Path:
    """Refuse what is no folder of a Hugging Face model: a misspelled one must not be looked for on the network."""
    if not (path / "config.json").is_file():
        raise Refused(f"{flag} must be a folder with a config.json, got {path}: names of a hub are not looked up")
    return path


def quiet_transformers() -> None:
    """Keep transformers from printing reports and progress between our own lines."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


# ---- results --------------------------------------------------------------------------------------------------------


class Results:
    """The files that a command writes; those whose place can no longer be written go to the temporary folder."""

    def __init__(self):
        self.elsewhere: list[str] = []

    def keep(self, path: Path | None, write: Callable[[Path], object]) -> None:
        """Write one result, unless there is no path: nobody asked for it."""
        if path is None:
            return
        try:
            write(path)
        except Exception as error:
            rescue = Path(tempfile.mkdtemp(prefix="childtune-"), path.name)
            write(rescue)
            self.elsewhere.append(f"{path} cannot be written ({brief(error)}): it is saved as {rescue}")

    def close(self) -> None:
        """Say, when everything has been kept, what is elsewhere.

        Raises:
            Failed: naming the files and where they are.
        """
        if self.elsewhere:
            raise Failed("; ".join(self.elsewhere))


def write_text(text: str) -> Callable[[Path], None]:
    """Return what writes a text to a path, whole or not at all."""

    def write(path: Path) -> None:
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")

    return write
