"""Files that are there whole or not at all, and the envelope of masks, Fisher information and deltas.

The envelope is a safetensors file. Its metadata name the format, its version, and ``file_digest``: blake2b, in 32
hexadecimal digits, over every byte of the file, these digits taken for zeros. Files of version 1 have no such digest.
It is written and read here, not by the safetensors library: that opens a file twice, holds its tensors twice or leaves
temporary files behind, and the bytes of the header, which the digest covers, are known to it alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes: where the tensors of a file start
_METADATA = "__metadata__"  # safetensors' own name in a header
_NO_DIGITS = "0" * 32
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

# ---- replacing a file -------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Give the path of a file to write; once it is written and on the disk, it takes the place of ``path``.

    Killed at any moment, a process leaves the old file, or the new one, under that name; what else it leaves is
    removed when ``path`` is next replaced. Any number of processes and threads may replace one path at a time. Of a
    symbolic link the file is replaced that it points to. A file that was there keeps its mode, a new one has that of
    any new file::

        with replacing("run.pt") as partial:
            torch.save(optimizer.state_dict(), partial)

    Raises:
        OSError: the file cannot be written, or is something else than a file.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(f"{target} must be a file, or not be there yet")
    _remove_leftovers(target)
    with _own_folder(target) as folder:
        partial = folder / target.name
        mode = _mode(target, folder)
        yield partial
        with open(partial, "rb") as file:
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(partial, target)
        with suppress(OSError):  # the file is in its place; not every file system can be asked this
            _sync_folder(target.parent)


@contextmanager
def _own_folder(target: Path) -> Iterator[Path]:
    """Give a folder beside the target, locked: whoever gets the lock later knows that its owner has died."""
    while True:
        prefix, suffix = _affixes(target)
        folder = Path(tempfile.mkdtemp(suffix, prefix, target.parent))
        with suppress(FileNotFoundError):  # taken for a leftover before it was locked
            descriptor = os.open(folder, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks: then leftovers stay
                _lock(descriptor)
            if folder.exists():
                break
            os.close(descriptor)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _remove_leftovers(target: Path) -> None:
    """Remove the folders in which processes that have died wrote files to replace the target."""
    prefix, suffix = _affixes(target)
    names = os.listdir(target.parent) if target.parent.is_dir() else []
    for name in names:
        if name.startswith(prefix) and name.endswith(suffix):
            with suppress(OSError):  # in use, or gone meanwhile
                descriptor = os.open(target.parent / name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                try:
                    _lock(descriptor, wait=False)
                    shutil.rmtree(target.parent / name)
                finally:
                    os.close(descriptor)


def _affixes(target: Path) -> tuple[str, str]:
    """Return how the names of the target's folders begin and end; short, as names have at most 255 bytes."""
    return f".{target.name[:40]}.childtune-", ".partial"


def _lock(descriptor: int, wait: bool = True) -> None:
    import fcntl  # here: it is not everywhere, and to import the package must not ask for it

    fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def _mode(target: Path, folder: Path) -> int:
    """Return the target's mode, or that of a new file, which the system knows (umask, defaults of the folder)."""
    if target.exists():
        return target.stat().st_mode & 0o7777
    probe = folder / "mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o7777
    probe.unlink()
    return mode


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- the envelope ---------------------------------------------------------------------------------------------------


class Envelope(NamedTuple):
    """What a file holds: the version of its format, its metadata, and its tensors in the order they were given in."""

    version: str
    about: dict[str, str]
    tensors: dict[str, Tensor]


def write(
    path: str | os.PathLike, form: str, version: str, about: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> None:
    """Write an envelope; a file at ``path`` is replaced at once or not at all.

    Args:
        path: of the file.
        form, version: the format's name and its version.
        about: further metadata.
        tensors: name -> tensor, of any device, strides and sharing; one at a time is brought to the CPU.

    Raises:
        OSError: the file cannot be written.
        ValueError: a tensor is called ``__metadata__``, or has a dtype that safetensors does not know.
    """
    by_size = sorted(tensors, key=lambda name: -tensors[name].element_size())  # so that each is aligned to its own
    header = _header({"file_digest": _NO_DIGITS, "format": form, "version": version, **about}, tensors, by_size)
    digest = hashlib.blake2b(header, digest_size=16)
    with replacing(path) as partial, open(partial, "xb") as file:
        file.write(header)
        for name in by_size:
            content = _bytes(tensors[name].detach().cpu())
            digest.update(content)
            file.write(content)
        file.seek(header.index(_NO_DIGITS.encode()))
        file.write(digest.hexdigest().encode())


def _header(about: Mapping[str, str], tensors: Mapping[str, Tensor], order: Sequence[str]) -> bytes:
    if _METADATA in tensors:
        raise ValueError(f"no tensor can be saved under the name {_METADATA!r}: safetensors keeps it for itself")
    offsets, end = {}, 0
    for name in order:
        if tensors[name].dtype not in _DTYPE_NAMES:
            raise ValueError(f"{name!r} must have a dtype that safetensors knows, got {tensors[name].dtype}")
        begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
        offsets[name] = [begin, end]
    entries = {
        name: {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets[name]}
        for name, tensor in tensors.items()
    }
    text = json.dumps({_METADATA: dict(about), **entries}, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


@contextmanager
def reading(path: str | os.PathLike, form: str, versions: Sequence[str]) -> Iterator[Envelope]:
    """Give what an envelope holds; what goes wrong then, or while the caller makes something of it, is a bad file.

    The file is opened once, so that one which is replaced meanwhile is read whole, old or new.

    Raises:
        OSError: the file cannot be read.
        ValueError: with the path: it holds something else, another version, or bytes that its digest does not fit.
    """
    try:
        with open(path, "rb") as file:
            envelope = _read(file, form, versions)
        yield envelope
    except OSError:
        raise
    except Exception as error:  # a damaged file can lead to any
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise ValueError(f"{os.fspath(path)} must hold {form} version {' or '.join(versions)}, got {reason}") from error


def _read(file: BinaryIO, form: str, versions: Sequence[str]) -> Envelope:
    size, start = os.fstat(file.fileno()).st_size, file.read(8)
    length = int.from_bytes(start, "little")
    if length > size - 8:
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    header = file.read(length)
    about, entries = _parsed(header, size - 8 - length)
    found = about.get("format"), about.get("version")
    if found[0] != form or found[1] not in versions:
        raise ValueError(f"{found[0]} version {found[1]}")
    written = about.get("file_digest")
    digest = hashlib.blake2b(start, digest_size=16)
    digest.update(header if written is None else header.replace(written.encode(), _NO_DIGITS.encode(), 1))
    tensors = {}
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        content = torch.empty(entry["data_offsets"][1] - entry["data_offsets"][0], dtype=torch.uint8)
        if file.readinto(content.numpy()) != content.numel():
            raise ValueError("fewer bytes than its header says")
        digest.update(content.numpy())
        tensors[name] = content.view(_DTYPES[entry["dtype"]]).view(entry["shape"])
    if (written is not None or found[1] != "1") and written != digest.hexdigest():
        raise ValueError(f"bytes of digest {digest.hexdigest()} where {written} was written")
    return Envelope(found[1], about, {name: tensors[name] for name in entries})


def _parsed(header: bytes, payload: int) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Return a header's metadata, and its entries, which must cover the payload without gaps."""
    entries = json.loads(header.decode(), object_pairs_hook=_unique)
    about, end = entries.pop(_METADATA, {}), 0
    if not all(isinstance(value, str) for value in about.values()):
        raise ValueError("metadata that are not text")
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        shape = entry["shape"]
        if not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"shape {shape} for {name!r}")
        begin, end = end, end + math.prod(shape) * _DTYPES[entry["dtype"]].itemsize
        if entry["data_offsets"] != [begin, end]:
            raise ValueError(f"bytes {entry['data_offsets']} for {name!r} where {begin} to {end} are expected")
    if end != payload:
        raise ValueError(f"tensors of {end} bytes in a file with {payload}")
    return about, entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a header in which a name stands twice")
    return found
