"""Files of every format: damaged they are refused, old ones are read, and many processes may write one at a time."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from childtune_kernels import ChildDelta, ChildMask, Fisher, files, replacing

safetensors = pytest.importorskip("safetensors.torch")
V1 = Path(__file__).parent / "data" / "v1"  # written by version 0.1 before files had a digest of every byte


def bits(*shape: int) -> torch.Tensor:
    return (torch.arange(torch.Size(shape).numel()) % 3 == 0).view(shape)


def models(new: bool = True) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the base and the tuned model of the deltas in the files of version 1."""

    def base():
        tied = torch.arange(60.0).view(6, 10)
        return {"embed.weight": tied, "head.weight": tied, "body": torch.arange(100.0), "steps": torch.tensor(3)}

    tuned = base()
    tuned["embed.weight"][2, 3] = -1
    tuned["body"], tuned["steps"] = -tuned["body"] - 1, torch.tensor(4)
    return base(), {**tuned, "new": torch.ones(2, 3).bfloat16()} if new else tuned


def a_mask() -> ChildMask:
    return ChildMask.from_dense({"b.weight": bits(5, 13), "a.bias": bits(31), "scale": bits(), "none": bits(0, 3)})


def a_fisher() -> Fisher:
    sums = {"z": torch.arange(6.0).view(2, 3), "a": torch.arange(4.0).double(), "s": torch.tensor(2.5)}
    return Fisher(sums, 7, rule="batch", notes={"z": "linear"}, backbone=["z", "s"])


def a_delta() -> ChildDelta:
    return ChildDelta.from_models(*models())


MADE: dict[str, Callable] = {"mask": a_mask, "fisher": a_fisher, "delta": a_delta}


def same_delta(a: ChildDelta, b: ChildDelta) -> bool:
    (base, _), (other, _) = models(), models()
    a.apply_(base)
    b.apply_(other)
    return base.keys() == other.keys() and all(torch.equal(base[name], other[name]) for name in base)


# ---- damage -------------------------------------------------------------------------------------------------------


def refused(load: Callable, path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match="x.safetensors must hold childtune_kernels"):
        load(path)


@pytest.fixture(params=MADE)
def saved(request, tmp_path) -> tuple[Callable, Path, bytes]:
    """How to load a file, where it is, and its bytes."""
    thing, path = MADE[request.param](), tmp_path / "x.safetensors"
    thing.save(path)
    type(thing).load(path)
    return type(thing).load, path, path.read_bytes()


def test_every_flipped_bit_is_refused(saved):
    load, path, content = saved
    for i in range(len(content)):
        for bit in range(8) if i < 16 else (random.Random(i).randrange(8),):
            refused(load, path, content[:i] + bytes([content[i] ^ 1 << bit]) + content[i + 1 :])


def test_every_other_damage_is_refused(saved):
    """Cut, extended, with pieces removed, repeated, moved or overwritten."""
    load, path, content = saved
    rng, start = random.Random(0), time.monotonic()
    for length in sorted({0, 1, 7, 8, 9, len(content) - 1, *rng.sample(range(len(content)), 40)}):
        refused(load, path, content[:length])
    for more in (b"\0", b" ", b"{}", content):
        refused(load, path, content + more)
    while time.monotonic() < start + 1.5:
        at, to, length = rng.randrange(len(content)), rng.randrange(len(content)), rng.randrange(1, 40)
        piece = rng.choice([b"", rng.randbytes(length), b"9" * length, b"[" * length, content[to : to + length]])
        changed = content[:at] + piece + content[at + rng.choice([0, length]) :]
        if changed != content:
            refused(load, path, changed)


def header_of(content: bytes) -> tuple[dict, bytes]:
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def with_header(header: dict | str, payload: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + payload


def test_every_edited_entry_of_the_header_is_refused(saved):
    """Also a digest that is gone, and a version that had none."""
    load, path, content = saved
    header, payload = header_of(content)
    about = header["__metadata__"]
    for key in about:
        for edited in (
            {k: v for k, v in about.items() if k != key},
            {**about, key: about[key] + "x"},
            {**about, key: 1},
        ):
            refused(load, path, with_header({**header, "__metadata__": edited}, payload))
    refused(load, path, with_header({**header, "__metadata__": {**about, "version": "1"}}, payload))
    refused(load, path, with_header({**header, "__metadata__": {**about, "more": ""}}, payload))
    refused(load, path, with_header({**header, "__metadata__": []}, payload))
    for name in header.keys() - {"__metadata__"}:
        entry = header[name]
        for edit in ({"shape": [*entry["shape"], 1]}, {"dtype": "F99"}, {"dtype": []}, {"data_offsets": [0, 2**62]},
                     {"shape": [2**70]}, {"shape": None}, {"data_offsets": [1]}, {"shape": [-1, -1]}):  # fmt: skip
            refused(load, path, with_header({**header, name: {**entry, **edit}}, payload))
        refused(load, path, with_header({("x" if k == name else k): v for k, v in header.items()}, payload))
    text = json.dumps(header)
    for damaged in ("[" * 100_000, "null", "[]", "{}", "1" * 10_000, "{" + text[1:-1] + "," + text[1:], "\ud800"):
        damaged = damaged.encode("utf-8", "surrogatepass").decode("latin-1")
        refused(load, path, with_header(damaged, payload))
    refused(load, path, (2**63).to_bytes(8, "little") + content[8:])


@pytest.mark.parametrize("kind, make", MADE.items(), ids=MADE)
def test_damaged_files_of_version_1_are_refused_or_harmless(kind, make, tmp_path):
    """Fisher information had no digest: there it is structure alone that is checked."""
    content, load, path = (V1 / f"{kind}.safetensors").read_bytes(), type(make()).load, tmp_path / "x"
    rng, accepted = random.Random(0), 0
    for _ in range(400):
        at = rng.randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :])
        try:
            found = load(path)
        except ValueError as error:
            assert str(path) in str(error)
            continue
        accepted += 1
        if kind == "mask":
            assert found == make()
        elif kind == "delta":
            try:
                assert same_delta(found, make())
            except ValueError:
                continue  # refused when it is applied
    assert accepted < 400


ENTRIES = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "U8", "shape": [], "data_offsets": [24, 25]},
}
SAME = json.dumps(ENTRIES["b"])
# What only the structure of a file without a digest shows, and what is said of it.
MALFORMED = {
    "twice": ('"b":' + SAME + ',"b":' + SAME, 25, "a header in which a name stands twice"),
    "twice, deeper": ('"b":{"dtype":"F32",' + SAME[1:], 25, "a header in which a name stands twice"),
    "negative": ({"b": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}, 4, r"shape \[-1, -1\] for 'b'"),
    "a fraction": ({"b": {"dtype": "U8", "shape": [1.0], "data_offsets": [0, 1]}}, 1, r"shape \[1.0\] for 'b'"),
    "true": ({"b": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}}, 1, r"shape \[True\] for 'b'"),
    "a gap": ({"b": {**ENTRIES["b"], "data_offsets": [1, 2]}}, 2, r"bytes \[1, 2\] for 'b' where 0 to 1 are expected"),
    "overlap": (
        {"a": ENTRIES["a"], "b": {**ENTRIES["b"], "data_offsets": [23, 24]}}, 24,
        r"bytes \[23, 24\] for 'b' where 24 to 25 are expected",
    ),
    "fewer": (
        {"a": {**ENTRIES["a"], "data_offsets": [0, 20]}}, 20, r"bytes \[0, 20\] for 'a' where 0 to 24 are expected",
    ),
    "more": ({"b": {**ENTRIES["b"], "data_offsets": [0, 2]}}, 2, r"bytes \[0, 2\] for 'b' where 0 to 1 are expected"),
    "a tail": (ENTRIES, 26, "tensors of 25 bytes in a file with 26"),
    "no tail": (ENTRIES, 24, "tensors of 25 bytes in a file with 24"),
    "no text": ({"__metadata__": {"format": "form", "version": "1", "n": 3}}, 0, "metadata that are not text"),
    "a newer form": ({"__metadata__": {"format": "form", "version": "2"}}, 0, "form version 2"),
    "another form": ({"__metadata__": {"format": "other", "version": "1"}}, 0, "other version 1"),
    "no form": ({"__metadata__": {}}, 0, "None version None"),
}  # fmt: skip


@pytest.mark.parametrize("entries, payload, message", MALFORMED.values(), ids=MALFORMED)
def test_malformed_files_without_a_digest_are_refused(entries, payload, message, tmp_path):
    path, about = tmp_path / "x", {"__metadata__": {"format": "form", "version": "1"}}
    if isinstance(entries, str):
        entries = json.dumps(about)[:-1] + "," + entries + "}"
    path.write_bytes(with_header(entries if isinstance(entries, str) else about | entries, bytes(payload)))
    with pytest.raises(ValueError, match=f"x must hold form version 1, got .*{message}$"):
        with files.reading(path, "form", ["1"]):
            raise AssertionError("a malformed file was read")


def test_entries_in_any_order_of_a_header(tmp_path):
    """Tensors come in the header's order, wherever their bytes lie."""
    about = {"__metadata__": {"format": "form", "version": "1"}}
    payload = torch.arange(6.0).numpy().tobytes() + b"\x07"
    (tmp_path / "x").write_bytes(with_header({"b": ENTRIES["b"]} | about | {"a": ENTRIES["a"]}, payload))
    with files.reading(tmp_path / "x", "form", ["0", "1"]) as envelope:
        assert list(envelope.tensors) == ["b", "a"] and envelope.version == "1"
        assert envelope.tensors["a"].equal(torch.arange(6.0).view(2, 3)) and envelope.tensors["b"].item() == 7


def with_metadata(path: Path, **changed: str | None) -> None:
    """Write a file again with other metadata, and the digest that it then has."""
    header, _ = header_of(path.read_bytes())
    about = {k: v for k, v in {**header["__metadata__"], **changed}.items() if v is not None}
    with files.reading(path, about["format"], [about["version"]]) as envelope:
        tensors = envelope.tensors
    del about["file_digest"]
    files.write(path, about.pop("format"), about.pop("version"), about, tensors)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"notes": "[]"}, "notes, backbone or left_out of other kinds"),
        ({"backbone": '{"z": 1}'}, "notes, backbone or left_out of other kinds"),
        ({"left_out": "[]"}, "notes, backbone or left_out of other kinds"),
        ({"notes": "null"}, "notes, backbone or left_out of other kinds"),
        ({"left_out": None}, "KeyError: 'left_out'"),
        ({"count": "0"}, "count must be at least 1, got 0"),
        ({"count": "-3"}, "count must be at least 1, got -3"),
        ({"count": "7.5"}, "invalid literal"),
        ({"backbone": '["z", "other"]'}, "backbone must name parameters in sums, got 'other'"),
        ({name: "" for name in "hgfedcba"}, "unknown metadata: " + ", ".join(f"'{name}'" for name in "abcdefgh")),
    ],
    ids=str,
)
def test_fisher_files_of_other_metadata_are_refused(changed, message, tmp_path):
    path = tmp_path / "x"
    a_fisher().save(path)
    with_metadata(path)
    assert list(Fisher.load(path)) == list(a_fisher())
    with_metadata(path, **changed)
    with pytest.raises(ValueError, match=f"must hold childtune_kernels.Fisher version 1 or 2, got .*{message}"):
        Fisher.load(path)


# ---- files of version 1 ----------------------------------------------------------------------------------------------


def test_masks_of_version_1():
    mask = ChildMask.load(V1 / "mask.safetensors")
    assert mask == a_mask() and list(mask) == list(a_mask())
    assert mask.digest() == a_mask().digest() == "144ad089db4b73aec37a69ef59e94323"


def test_a_mask_of_version_1_of_a_wrapped_model(tmp_path):
    mask = ChildMask.load(V1 / "mask_wrapped.safetensors")
    expected = {"b.weight": bits(5, 13), "b.a": bits(31), "0.weight": bits(2, 32)}
    assert set(mask) == set(expected) and mask == ChildMask.from_dense(expected)
    mask.save(tmp_path / "again")
    assert ChildMask.load(tmp_path / "again").digest() == mask.digest() == ChildMask.from_dense(expected).digest()


def test_fisher_of_version_1():
    fisher = Fisher.load(V1 / "fisher.safetensors")
    assert list(fisher.sums) == ["z", "a", "s"] and fisher.count == 7 and fisher.rule == "batch"
    assert all(torch.equal(fisher.sums[n], a_fisher().sums[n]) for n in fisher) and fisher.backbone == ["z", "s"]
    assert set(Fisher.load(V1 / "fisher_without_notes.safetensors").sums) == {"z", "a"}


def test_deltas_of_version_1():
    base, tuned = models()
    ChildDelta.load(V1 / "delta.safetensors").apply_(base)
    assert base.keys() == tuned.keys() and all(torch.equal(base[n], tuned[n]) for n in tuned)


def test_a_delta_of_version_1_of_a_compiled_model():
    base, tuned = ({f"_orig_mod.{n}": t for n, t in state.items()} for state in models(new=False))
    delta, original = ChildDelta.load(V1 / "delta_wrapped.safetensors"), {n: t.clone() for n, t in base.items()}
    delta.apply_(base)
    assert all(torch.equal(base[n], tuned[n]) for n in tuned)
    delta.revert_(base, original)
    assert all(torch.equal(base[n], original[n]) for n in original)


# ---- what survives -------------------------------------------------------------------------------------------------


def test_fisher_survives_whatever_its_tensors_are(tmp_path):
    shared = torch.arange(12.0)
    sums = {
        "z.weight": torch.arange(12.0).view(3, 4).t(),
        "b": torch.arange(5).double() / 3,
        "scalar": torch.tensor(2.0),
        "empty": torch.empty(0, 3),
        "view": shared[2:5],
        "all": shared,
        "expanded": torch.ones(1).expand(4),
        "graph": torch.ones(2, requires_grad=True),
        "a" * 10_000: torch.ones(1),
        'é"\\\n😀': torch.ones(1),
    }
    fisher = Fisher(sums, 3, notes={"b": "how"}, backbone=["b"])
    fisher.save(tmp_path / "f")
    loaded = Fisher.load(tmp_path / "f")
    assert list(loaded.sums) == list(sums) and loaded.notes == {"b": "how"} and loaded.backbone == ["b"]
    for name, total in sums.items():
        assert loaded.sums[name].dtype == total.dtype and torch.equal(loaded.sums[name], total)


def test_the_safetensors_library_reads_the_files(tmp_path):
    tensors = {
        "half": torch.arange(3).half(), "bool": torch.tensor(True), "double": torch.arange(5.0).double(),
        "byte": torch.arange(3, dtype=torch.uint8), "none": torch.ones(0, 2), 'é"😀': torch.arange(3).int(),
    }  # fmt: skip
    files.write(tmp_path / "x", "form", "1", {}, tensors)
    found = safetensors.load_file(tmp_path / "x")
    assert found.keys() == tensors.keys() and all(torch.equal(found[n], tensors[n]) for n in tensors)
    with files.reading(tmp_path / "x", "form", ["1"]) as envelope:
        assert list(envelope.tensors) == list(tensors)
        assert all(t.data_ptr() % t.element_size() == 0 for t in envelope.tensors.values())


@pytest.mark.parametrize(
    "make", [lambda t: Fisher(t, 1), lambda t: ChildMask.from_dense({n: b > 0 for n, b in t.items()})]
)
def test_what_cannot_be_saved_is_refused_and_leaves_the_old_file(make, tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(ValueError, match="'__metadata__': safetensors keeps it"):
        make({"a": torch.ones(1), "__metadata__": torch.ones(1)}).save(path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x"]


def test_unknown_dtypes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'a' must have a dtype that safetensors knows, got torch.complex128"):
        files.write(tmp_path / "x", "form", "1", {}, {"a": torch.ones(1, dtype=torch.complex128)})
    assert not os.listdir(tmp_path)


def test_a_folder_is_an_os_error(tmp_path):
    for load in (ChildMask.load, Fisher.load, ChildDelta.load):
        with pytest.raises(OSError):
            load(tmp_path)
        with pytest.raises(FileNotFoundError):
            load(tmp_path / "none")
    with pytest.raises(OSError, match="must be a file"):
        a_mask().save(tmp_path)


# ---- replacing -----------------------------------------------------------------------------------------------------


def put(path: Path, text: str = "new") -> None:
    with replacing(path) as partial:
        partial.write_text(text)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_new_file_has_an_ordinary_mode_and_an_old_one_keeps_its_own(umask, tmp_path):
    old = os.umask(umask)
    try:
        for write in (put, a_mask().save, lambda p: files.write(p, "f", "1", {}, {})):
            (tmp_path / "x").unlink(missing_ok=True)
            write(tmp_path / "x")
            assert mode(tmp_path / "x") == 0o666 & ~umask
            os.chmod(tmp_path / "x", 0o640)
            write(tmp_path / "x")
            assert mode(tmp_path / "x") == 0o640
    finally:
        os.umask(old)


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_written_through(there, tmp_path):
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "x", tmp_path / "link"
    link.symlink_to(Path("real") / "x")
    if there:
        target.write_text("old")
    put(link)
    assert link.is_symlink() and target.read_text() == "new" and os.listdir(tmp_path / "real") == ["x"]


def test_the_users_own_files_are_left_alone(tmp_path):
    own = ["mine.partial", ".mine.partial", ".mine.childtune-notes", ".tmpABCDEF"]
    for name in own:
        (tmp_path / name).write_text("own")
    put(tmp_path / "mine")
    assert sorted(os.listdir(tmp_path)) == sorted([*own, "mine"])
    assert all((tmp_path / name).read_text() == "own" for name in own)


def test_errors_leave_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / ("x" * 250)  # as long as names may be
    put(path, "old")
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), replacing(path) as partial:
            partial.write_text("half")
            raise error
    with pytest.raises(FileNotFoundError), replacing(path):
        pass  # nothing was written
    assert path.read_text() == "old" and os.listdir(tmp_path) == [path.name]
    with pytest.raises(FileNotFoundError):
        put(tmp_path / "absent" / "x")


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    """And so is its name, once it has."""
    done, sync, move = [], os.fsync, os.replace

    def synced(file):
        status = os.fstat(file)
        done.append("folder" if stat.S_ISDIR(status.st_mode) else status.st_size)
        sync(file)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("moved"), move(*paths)))
    put(tmp_path / "x", "12345")
    assert done == [5, "moved", "folder"]


def test_an_error_is_not_hidden_by_what_cannot_be_removed(tmp_path):
    with pytest.raises(KeyError, match="mine"), replacing(tmp_path / "x") as partial:
        partial.parent.rmdir()
        raise KeyError("mine")
    assert not os.listdir(tmp_path)


def test_saves_within_one_another_do_not_meet(tmp_path):
    with replacing(tmp_path / "x") as first:
        first.write_text("first")
        put(tmp_path / "x", "second")
        assert (tmp_path / "x").read_text() == "second" and first.read_text() == "first"
    assert (tmp_path / "x").read_text() == "first" and os.listdir(tmp_path) == ["x"]


def _hang(path: Path, written) -> None:
    with replacing(path) as partial:
        partial.write_text("half")
        (partial.parent / ".tmpABCDEF").write_text("as safetensors does")
        written.set()
        time.sleep(60)


def test_what_a_killed_process_leaves_is_removed_by_the_next_save(tmp_path):
    context = multiprocessing.get_context("fork")
    written, path = context.Event(), tmp_path / "x"
    process = context.Process(target=_hang, args=(path, written))
    process.start()
    assert written.wait(30)
    put(path, "beside a live one")
    assert len(os.listdir(tmp_path)) == 2, "the other process still writes"
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    put(path)
    assert os.listdir(tmp_path) == ["x"] and path.read_text() == "new"


def _save_often(path: Path, i: int, failures) -> None:
    mask = ChildMask.from_dense({"w": torch.arange(5000) % (i + 2) == 0})
    try:
        for _ in range(40):
            mask.save(path)
            ChildMask.load(path)
    except BaseException as error:
        failures.put(repr(error))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_many_processes_save_and_read_one_path(tmp_path):
    context = multiprocessing.get_context("fork")
    failures, path = context.Queue(), tmp_path / "x"
    processes = [context.Process(target=_save_often, args=(path, i, failures)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert failures.empty(), failures.get()
    assert ChildMask.load(path).count() in {5000 // n + (5000 % n > 0) for n in range(2, 6)}
    assert os.listdir(tmp_path) == ["x"]
