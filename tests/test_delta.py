"""ChildDelta: the tuned bits exactly, on the right base only, and files that are whole or not there."""

from __future__ import annotations

import copy
import itertools
import os
import pathlib
import shutil
import signal
import sys
import tempfile
from functools import partial

import pytest
import torch
from oracles import INT_OF, same_bits
from safetensors.torch import load_file, save_file
from torch import nn

from childtune_kernels import ChildAdamW, ChildDelta, ChildMask, files, replacing

SIZES = ((0,), (1,), (31,), (32,), (33,), (7, 13), (), (3, 0, 2))
ALL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)


def random_state(dtypes=ALL_DTYPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{dtype}{list(shape)}".replace("torch.", ""): (torch.randn(shape, generator=generator) * 50).to(dtype)
        for dtype in dtypes
        for shape in SIZES
    }


def changed(state, share, seed=1):
    """Another state in which about a share of every tensor has other bits."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, tensor in state.items():
        where = torch.rand(tensor.shape, generator=generator) < share
        other = ~tensor if tensor.dtype == torch.bool else tensor + 1
        result[name] = torch.where(where, other, tensor)
    return result


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(bits(a[n]).equal(bits(b[n])) and a[n].dtype == b[n].dtype for n in a)


def bits(tensor):
    return tensor.detach().cpu().contiguous().view(-1).view(INT_OF[tensor.element_size()])


def copied(state):
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])
def test_round_trip(share, tmp_path):
    base = random_state()
    tuned = changed(base, share)
    delta = ChildDelta.from_models(base, tuned)
    delta.save(tmp_path / "d.safetensors")
    for held in (delta, ChildDelta.load(tmp_path / "d.safetensors")):
        target = copied(base)
        held.apply_(target)
        assert equal(target, tuned)
        held.revert_(target, base)
        assert equal(target, base)
    assert share or delta.nbytes == 0
    assert not list(tmp_path.glob("*.partial"))


def test_bits_are_compared_not_values():
    base = {"w": torch.zeros(40)}
    tuned = {"w": torch.zeros(40)}
    tuned["w"][3] = -0.0
    tuned["w"].view(torch.int32)[5] = 0x7FC00001  # a NaN with a payload
    delta = ChildDelta.from_models(base, tuned)
    assert delta.mask.count() == 2
    delta.apply_(base)
    assert bits(base["w"]).equal(bits(tuned["w"]))
    assert ChildDelta.from_models(tuned, tuned).nbytes == 0, "NaNs that are equal bit for bit have not changed"


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(9, 4), nn.BatchNorm1d(4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight


def test_tied_weights_and_buffers():
    base, tuned = Tied(), Tied()
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        tuned.embed.weight[2, 1] += 1
        tuned.norm.running_mean[0] = 3
        tuned.norm.num_batches_tracked += 7
    delta = ChildDelta.from_models(base, tuned)
    assert delta.aliases == {"head.weight": "embed.weight"} and "head.weight" not in delta.values
    separate = copied(base.state_dict())  # no longer tied: both get the values
    delta.apply_(separate)
    assert equal(separate, tuned.state_dict())
    delta.apply_(base)
    assert equal(base.state_dict(), tuned.state_dict()) and base.head.weight is base.embed.weight


def test_weights_tied_in_the_tuned_model_only():
    base = copied(Tied().state_dict())
    base["head.weight"] += 1
    tuned = Tied()
    delta = ChildDelta.from_models(base, tuned)
    assert delta.aliases == {}
    delta.apply_(base)
    assert equal(base, tuned.state_dict())


def test_a_new_head():
    base = {"body": torch.arange(64.0)}
    tuned = {"body": torch.arange(64.0), "head": torch.randn(2, 3)}
    tuned["body"][5] = 0.5
    delta = ChildDelta.from_models(base, tuned)
    assert delta.added == ["head"]
    target = copied(base)
    delta.apply_(target)
    assert equal(target, tuned)
    delta.revert_(target, base)
    assert equal(target, base)

    class Model(nn.Module):
        def __init__(self, rows):
            super().__init__()
            self.body, self.head = nn.Parameter(torch.arange(64.0)), nn.Parameter(torch.zeros(rows, 3))

    model = Model(2)
    delta.apply_(model)
    assert equal(model.state_dict(), tuned)
    wrong = Model(4)
    before = copied(wrong.state_dict())
    with pytest.raises(ValueError, match=r"target's 'head' must be \(2, 3\) torch.float32, got .*\(4, 3\)"):
        delta.apply_(wrong)
    assert equal(wrong.state_dict(), before)


def test_the_wrong_base_is_refused():
    base = random_state()
    delta = ChildDelta.from_models(base, changed(base, 0.3))
    for name in ("float32[7, 13]", "bool[33]"):
        other = copied(base)
        other[name].view(-1)[0] = 1 - other[name].view(-1)[0].to(torch.float32)
        before = copied(other)
        with pytest.raises(ValueError, match="target must be the base of this delta, of digest .*, got"):
            delta.apply_(other)
        assert equal(other, before)
    renamed = {f"x.{name}": tensor for name, tensor in base.items()}
    with pytest.raises(ValueError, match="target must be the base"):
        delta.apply_(renamed)


def test_reverting_refuses_what_it_would_overwrite():
    base = {"w": torch.arange(100.0)}
    tuned = {"w": torch.arange(100.0)}
    tuned["w"][7] = -1
    delta = ChildDelta.from_models(base, tuned)
    later = copied(tuned)
    later["w"][7] = -2
    with pytest.raises(ValueError, match="target's 'w' must be as this delta made it"):
        delta.revert_(later, base)
    with pytest.raises(ValueError, match="base must be the base of this delta"):
        delta.revert_(tuned, tuned)
    assert later["w"][7] == -2 and tuned["w"][7] == -1


def test_models_that_do_not_compare():
    with pytest.raises(ValueError, match=r"tuned's 'w' must be \(3,\) torch.float32, got 'nothing'"):
        ChildDelta.from_models({"w": torch.zeros(3)}, {})
    with pytest.raises(ValueError, match=r"tuned's 'w' must be \(3,\) torch.float32, got '\(3,\) torch.bfloat16'"):
        ChildDelta.from_models({"w": torch.zeros(3)}, {"w": torch.zeros(3).bfloat16()})


def test_strided_tensors(device):
    base = {"w": torch.arange(60.0, device=device).view(6, 10).t(), "e": torch.zeros(1, device=device)}
    tuned = {"w": base["w"].clone(), "e": base["e"].clone()}
    tuned["w"][3, 2] = -5
    target = {name: tensor.clone(memory_format=torch.preserve_format) for name, tensor in base.items()}
    ChildDelta.from_models(base, tuned).apply_(target)
    assert equal(target, tuned)


# ---- several --------------------------------------------------------------------------------------------------------


def of(base, positions, value):
    tuned = copied(base)
    tuned["w"][positions] = value
    return ChildDelta.from_models(base, tuned), tuned


def test_merging():
    base = {"w": torch.arange(200.0), "v": torch.zeros(5)}
    (a, _), (b, _), (c, _) = of(base, [1, 2], -1.0), of(base, [50], -2.0), of(base, [2, 60], -1.0)
    merged = ChildDelta.merge([a, b, c])
    target = copied(base)
    merged.apply_(target)
    expected = torch.arange(200.0)
    expected[[1, 2, 60]], expected[50] = -1, -2
    assert torch.equal(target["w"], expected) and merged.mask.count() == 4
    with pytest.raises(ValueError, match=r"must agree where they meet.* by tensor: \{'w': 2\}"):
        ChildDelta.merge([a, of(base, [1, 2, 3], 7.0)[0]])
    whole = ChildDelta.from_models(base, {"w": base["w"] - 1, "v": base["v"] + 1})
    assert set(whole.dense) == {"w", "v"}
    with pytest.raises(ValueError, match=r"by tensor: \{'w': 1\}"):
        ChildDelta.merge([whole, of(base, [0, 50], torch.tensor([-1.0, 99.0]))[0]])
    other = {"w": torch.arange(200.0) + 1, "v": torch.zeros(5)}
    with pytest.raises(ValueError, match="deltas must be of one base"):
        ChildDelta.merge([a, of(other, [9], 0.0)[0]])
    with pytest.raises(ValueError, match="at least one"):
        ChildDelta.merge([])


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_of_a_trained_child(dtype, tmp_path):
    """What changed lies inside the child, and its file is about as large as the child."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 2)).to(dtype)
    base = copy.deepcopy(model)
    mask = ChildMask.from_dense({"0.weight": torch.rand(128, 64) < 0.1})
    opt = ChildAdamW(model.named_parameters(), lr=1e-2, mask=mask)
    for _ in range(5):
        opt.zero_grad()
        model(torch.randn(8, 64, dtype=dtype)).float().square().sum().backward()
        opt.step()
    delta = ChildDelta.from_models(base, model)
    assert delta.mask.count("0.weight") > 0.9 * mask.count("0.weight")
    assert (ChildMask.from_dense({"0.weight": delta.mask.to_dense("0.weight")}) - mask).count() == 0
    assert delta.nbytes < 0.3 * delta.base_nbytes and f"{delta.nbytes:,} bytes" in repr(delta)
    delta.save(tmp_path / "d.safetensors")
    assert delta.nbytes < (tmp_path / "d.safetensors").stat().st_size < delta.nbytes + 4096
    ChildDelta.load(tmp_path / "d.safetensors").apply_(base)
    assert equal(base.state_dict(), model.state_dict())


# ---- files ----------------------------------------------------------------------------------------------------------


def rewritten(path, **metadata):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        old = file.metadata()
    save_file(load_file(path), path, {**old, **metadata})


@pytest.mark.parametrize("kind", ["newer", "mask", "content", "truncated", "text", "empty"])
def test_bad_files_are_refused(kind, tmp_path):
    path = tmp_path / "d.safetensors"
    base = {"w": torch.arange(100.0)}
    of(base, [3, 5], -1.0)[0].save(path)
    if kind == "newer":
        rewritten(path, version="3")
    elif kind == "mask":
        ChildMask.from_dense({"w": torch.ones(3, dtype=torch.bool)}).save(path)
    elif kind == "content":
        tensors = load_file(path)
        tensors["values/w"][0] = 9
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            old = file.metadata()
        save_file(tensors, path, old)
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-3])
    else:
        path.write_bytes(b"not a delta" if kind == "text" else b"")
    with pytest.raises(ValueError, match="must hold childtune_kernels.ChildDelta version 1 or 2, got"):
        ChildDelta.load(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(OSError):
        ChildDelta.load(tmp_path / "absent.safetensors")


def at_call(number):
    """Have this process killed after a call out of Python, by number, while it replaces a file.

    Only such a call can change what is on the disk.
    """
    left = itertools.count(number, -1)
    within = {files.__file__, shutil.__file__, tempfile.__file__, pathlib.__file__}

    def profile(frame, event, argument):
        if event == "c_return" and frame.f_code.co_filename in within and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(profile)


def at_byte(number):
    """Have this process killed where a file that it writes would become longer than a number of bytes."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))


def was_killed(moment, number, work) -> bool:
    """Fork a process that does some work, to be killed at a moment of it; return whether it was."""
    child = os.fork()
    if child == 0:
        try:
            moment(number)
            work()
            sys.setprofile(None)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0
    return os.WIFSIGNALED(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("what", ["delta", "checkpoint"])
def test_a_killed_process_leaves_a_whole_file(what, tmp_path):
    """Processes that replace one version by another are killed inside of the writing, and after every call."""
    path = tmp_path / "file"
    base = {"w": torch.arange(20_000.0)}
    versions = [of(base, slice(0, 2000), value)[0] for value in (-1.0, -2.0)]

    def write(i):
        if what == "delta":
            versions[i].save(path)
        else:
            with replacing(path) as file:
                torch.save({"state": versions[i].values["w"]}, file)

    def read():
        values = ChildDelta.load(path).values["w"] if what == "delta" else torch.load(path)["state"]
        return [same_bits(values, version.values["w"]) for version in versions].index(True)

    write(0)
    size = path.stat().st_size
    for number in (0, 1, size // 3, size // 2, size - 1):
        assert was_killed(at_byte, number, partial(write, 1)) and read() == 0
    replaced, killed = [], True
    while killed:
        killed = was_killed(at_call, len(replaced), partial(write, 1))
        replaced.append(read())
        write(0)
        assert os.listdir(tmp_path) == ["file"] and read() == 0
    assert replaced == sorted(replaced) and replaced[0] == 0 and replaced[-2:] == [1, 1], "killed before and after"


# ---- all or nothing -------------------------------------------------------------------------------------------------


def wrapped_in(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_a_wrapped_models_delta_is_the_bare_models(prefix):
    base, tuned = {"a.w": torch.arange(90.0), "b": torch.zeros(3)}, {"a.w": torch.arange(90.0), "b": torch.ones(3)}
    tuned["a.w"][[3, 40]], tuned["new"] = -1, torch.ones(2)
    bare = ChildDelta.from_models(base, tuned)
    wrapped = ChildDelta.from_models(wrapped_in(prefix, copied(base)), wrapped_in(prefix, tuned))
    assert wrapped.base == bare.base and wrapped.mask == bare.mask and wrapped.added == ["new"]
    for delta, first in ((wrapped, ""), (bare, prefix), (wrapped, prefix)):
        target = wrapped_in(first, copied(base))
        delta.apply_(target)
        assert equal(target, wrapped_in(first, tuned))
        delta.revert_(target, base)
        assert equal(target, wrapped_in(first, base))


def test_wrapped_modules():
    model = nn.Sequential(nn.Linear(9, 9), nn.BatchNorm1d(9))
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned[0].weight[2, 3] += 1
        tuned[1].running_mean += 1
    delta, compiled = ChildDelta.from_models(torch.compile(model), torch.compile(tuned)), copy.deepcopy(model)
    delta.apply_(torch.compile(compiled))
    assert equal(compiled.state_dict(), tuned.state_dict())
    delta.apply_(model)
    assert equal(model.state_dict(), tuned.state_dict())


def test_parts_called_module(tmp_path):
    base = {"module.a": torch.arange(90.0), "module.module.a": torch.arange(90.0), "b": torch.zeros(3)}
    for names in (["module.a"], ["module.module.a"], ["module.a", "module.module.a"]):
        tuned = copied(base)
        for name in names:
            tuned[name][len(name)] = -1
        ChildDelta.from_models(base, tuned).save(tmp_path / "d")
        target = copied(base)
        ChildDelta.load(tmp_path / "d").apply_(target)
        assert equal(target, tuned)


def pieces(delta, **changed):
    names = ("base", "mask", "values", "dense", "added", "aliases", "base_nbytes")
    return ChildDelta(**{**{name: getattr(delta, name) for name in names}, **changed})


def tied(new=False):
    base = copied(Tied().state_dict())
    base["head.weight"] = base["embed.weight"]
    tuned = copied(base)
    tuned["embed.weight"][2, 1] += 1
    tuned["head.weight"], tuned["norm.bias"] = tuned["embed.weight"], tuned["norm.bias"] + 1
    if new:
        del base["head.weight"]
    return base, tuned


DAMAGES = {
    "a letter of an alias": {"aliases": {"head.weighx": "embed.weight"}},
    "a letter of what it stands for": {"aliases": {"head.weight": "embed.weighx"}},
    "another alias": {"aliases": {"norm.weight": "norm.running_mean", "head.weight": "embed.weight"}},
    "an alias of another shape": {"aliases": {"norm.weight": "embed.weight", "head.weight": "embed.weight"}},
    "a name": {"dense": {"norm.biax": torch.ones(4)}},
    "a shape": {"dense": {"norm.bias": torch.ones(5)}},
    "a shape of as many": {"dense": {"norm.bias": torch.ones(2, 2)}},
    "a dtype": {"dense": {"norm.bias": torch.ones(4, dtype=torch.float64)}},
    "a dtype of as many bytes": {"dense": {"norm.bias": torch.ones(4, dtype=torch.int32)}},
    "a mask's shape": {"mask": ChildMask.from_dense({"embed.weight": torch.arange(35).view(5, 7) == 9})},
    "a mask of as many": {"mask": ChildMask.from_dense({"embed.weight": torch.arange(36).view(4, 9) == 9})},
    "values' dtype": {"values": {"embed.weight": torch.ones(1, dtype=torch.int32)}},
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_nothing_is_written_unless_all_fits(damage):
    base, tuned = tied()
    delta = ChildDelta.from_models(base, tuned)
    assert delta.aliases == {"head.weight": "embed.weight"} and set(delta.values) == {"embed.weight"}
    damaged = pieces(delta, **damage)
    for what in ("apply", "revert"):
        target = copied(base if what == "apply" else tuned)
        before = copied(target)
        with pytest.raises(ValueError, match="must be"):
            damaged.apply_(target) if what == "apply" else damaged.revert_(target, base)
        assert equal(target, before)


def test_parts_that_do_not_fit_each_other_are_refused():
    delta = ChildDelta.from_models(*tied())
    one = {"embed.weight": torch.ones(1)}
    for changed in (
        {"values": {"embed.weight": torch.ones(2)}},
        {"values": {}},
        {"values": {**one, "more": torch.ones(1)}},
        {"dense": one},
        {"added": ["other"]},
        {"aliases": {"norm.bias": "embed.weight"}},
        {"aliases": {"a": "b", "b": "embed.weight"}},
    ):
        with pytest.raises(ValueError):
            pieces(delta, **changed)


def test_a_delta_and_its_target_share_no_memory():
    base = {"w": torch.arange(100.0), "all": torch.zeros(4)}
    tuned = {"w": torch.arange(100.0), "all": torch.ones(4), "new": torch.ones(3), "tied": torch.ones(3)}
    tuned["tied"], tuned["w"][4] = tuned["new"], -1
    delta = ChildDelta.from_models(base, tuned)
    expected = copied(tuned)
    for tensor in tuned.values():
        tensor.add_(1)
    for held in (delta, ChildDelta.merge([delta]), ChildDelta.merge([delta, delta])):
        for _ in range(2):
            target = copied(base)
            held.apply_(target)
            assert equal(target, expected), "training of an earlier target changed the delta"
            for tensor in target.values():
                tensor.add_(1)
    merged, target = ChildDelta.merge([delta]), copied(base)
    delta.apply_(target)
    for tensor in (*delta.values.values(), *delta.dense.values()):
        tensor.fill_(7)
    assert equal(target, expected)
    target = copied(base)
    merged.apply_(target)
    assert equal(target, expected)


def test_a_new_name_of_an_old_tensor():
    """A dict gets a tensor of its own for it, equal to the old one; a module must have it."""
    base, tuned = tied(new=True)
    delta = ChildDelta.from_models(base, tuned)
    assert delta.aliases == {"head.weight": "embed.weight"} and delta.added == ["head.weight"]
    target = copied(base)
    delta.apply_(target)
    assert equal(target, tuned)
    delta.revert_(target, base)
    assert equal(target, base)
    separate = {**copied(base), "head.weight": torch.zeros(9, 4)}
    delta.apply_(separate)
    assert equal(separate, tuned)
    both = Tied()
    both.load_state_dict(tuned)
    delta.revert_(both, base)
    assert equal({n: t for n, t in both.state_dict().items() if n != "head.weight"}, base)
    unchanged = {**copied(base), "head.weight": torch.zeros(9, 4)}
    same = {**copied(base)}
    same["head.weight"] = same["embed.weight"]
    ChildDelta.from_models(base, same).apply_(unchanged)
    assert equal(unchanged, same)


def test_ties_of_what_did_not_change():
    base, tuned = tied()
    tuned["embed.weight"].copy_(base["embed.weight"])
    delta = ChildDelta.from_models(base, tuned)
    assert delta.aliases == {"head.weight": "embed.weight"} and "embed.weight" not in delta.values | delta.dense
    target = copied(base)
    delta.apply_(target)
    assert equal(target, tuned)
    target["head.weight"] += 1  # of which this says nothing
    expected = {**copied(base), "head.weight": target["head.weight"].clone()}
    delta.revert_(target, base)
    assert equal(target, expected)


def test_tensors_that_share_memory_must_become_the_same():
    base = {"a": torch.arange(40.0), "b": torch.arange(40.0)}

    def apply(changes, target):
        tuned = copied(base)
        for name, value in changes.items():
            tuned[name][3] = value
        delta, before = ChildDelta.from_models(base, tuned), copied(target)
        try:
            delta.apply_(target)
        except ValueError as error:
            assert "different" in str(error) and equal(target, before)
            return False
        assert equal(target, tuned)
        delta.revert_(target, base)
        return equal(target, base)

    memory = torch.arange(40.0)
    assert apply({"a": -1, "b": -2}, copied(base))
    assert not apply({"a": -1, "b": -2}, {"a": memory, "b": memory})
    assert not apply({"a": -1}, {"a": memory, "b": memory})
    assert apply({"a": -1, "b": -1}, {"a": memory, "b": memory})
    base = {"a": torch.arange(8.0), "b": torch.arange(4.0)}
    memory = torch.arange(8.0)
    assert not apply({"a": -1}, {"a": memory, "b": memory[:4]})
    assert not apply({"b": -1}, {"a": memory, "b": memory[:4]})


def test_a_tensor_whose_elements_share_memory_is_refused():
    base, tuned = {"a": torch.ones(5), "b": torch.zeros(5)}, {"a": torch.ones(5), "b": torch.ones(5)}
    tuned["a"][1] = 2
    target = {"a": torch.ones(1).expand(5), "b": torch.zeros(5)}
    with pytest.raises(ValueError, match="target's 'a' must be a tensor whose elements are its own"):
        ChildDelta.from_models(base, tuned).apply_(target)
    assert target["b"].eq(0).all()


def test_what_is_no_tensor_is_refused():
    with pytest.raises(ValueError, match="'extra' must be a tensor, got 'int'"):
        ChildDelta.from_models({"extra": 3}, {"extra": 3})


def test_merging_looks_at_shapes_and_ties():
    base = {"w": torch.arange(200.0)}
    shapes = [ChildDelta.from_models(base, {**base, "new": torch.ones(shape)}) for shape in ((2, 3), (3, 2))]
    with pytest.raises(ValueError, match="deltas' 'new' must be of one shape and dtype"):
        ChildDelta.merge(shapes)
    start, tuned = tied()
    whole = ChildDelta.from_models(start, tuned)  # ties
    loose, other = copied(start), copied(start)
    other["embed.weight"][5, 0] = 9
    apart = ChildDelta.from_models(loose, other)  # does not, and changes one of the two
    target, expected = copied(start), copied(tuned)
    ChildDelta.merge([whole, apart]).apply_(target)
    expected["embed.weight"][5, 0] = 9
    assert equal(target, expected) and target["head.weight"][5, 0] != 9
    both = ChildDelta.merge([whole, whole])
    assert both.aliases == whole.aliases and both.mask == whole.mask
    new = [ChildDelta.from_models(base, {**base, "z": tensor}) for tensor in (base["w"], torch.ones(200))]
    with pytest.raises(ValueError, match="deltas' new 'z' must be an alias of one tensor"):
        ChildDelta.merge(new)


def test_the_masks_digest_is_compared(tmp_path):
    from childtune_kernels import files

    path = tmp_path / "d"
    of({"w": torch.arange(100.0)}, [3, 5], -1.0)[0].save(path)
    with files.reading(path, "childtune_kernels.ChildDelta", ["2"]) as envelope:
        about = {k: v for k, v in envelope.about.items() if k not in ("format", "version", "file_digest")}
    files.write(path, "childtune_kernels.ChildDelta", "2", {**about, "mask": "0" * 32}, envelope.tensors)
    with pytest.raises(ValueError, match="mask must be the one that was written"):
        ChildDelta.load(path)


# ---- to the letter and to the byte ----------------------------------------------------------------------------------


def several():
    """A delta of values, of whole tensors, of a tie, and of new tensors that are and are not others."""
    base, tuned = tied()
    tuned["new"] = torch.ones(2, 3, dtype=torch.bfloat16)
    tuned["twin"] = tuned["norm.weight"]
    delta = ChildDelta.from_models(base, tuned)
    assert set(delta.values) == {"embed.weight"} and set(delta.dense) == {"norm.bias", "new"}
    assert delta.aliases == {"head.weight": "embed.weight", "twin": "norm.weight"}
    return base, tuned, delta


def test_a_description_and_the_sizes():
    base, _, delta = several()
    size = sum(tensor.nbytes for tensor in base.values())
    words = 2 * 4  # one bit for each of 36 elements
    nbytes = words + 4 + 4 * 4 + 6 * 2
    assert (delta.nbytes, delta.base_nbytes) == (nbytes, size)
    assert repr(delta) == (
        "ChildDelta(1 values in 1 tensors, 2 whole tensors of 10, 1 of them new; "
        f"{nbytes:,} bytes, {nbytes / size:.1%} of the base; base {delta.base})"
    )
    nothing = ChildDelta.from_models({}, {"new": torch.ones(1000)})
    assert "1 whole tensors of 1,000, 1 of them new; 4,000 bytes, 0.0% of the base; base" in repr(nothing)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_a_tensor_is_kept_whole_where_that_takes_no_more(dtype):
    """One bit an element and the changed values, against all values."""
    size, numel = dtype.itemsize, 64
    limit = numel - numel // (8 * size)  # changed values and bits take as much as all values
    for count, whole in ((0, False), (1, False), (limit - 1, False), (limit, True), (numel, True)):
        base = {"w": torch.zeros(numel, dtype=dtype)}
        tuned = {"w": torch.zeros(numel, dtype=dtype)}
        tuned["w"][:count] = 1
        delta = ChildDelta.from_models(base, tuned)
        assert ("w" in delta.dense, "w" in delta.values) == (whole, 0 < count and not whole), count
        assert delta.nbytes == (0 if not count else numel * size if whole else numel // 8 + count * size)


@pytest.mark.parametrize("name", ["embed.weight", "head.weight", "norm.bias", "new", "twin"])
@pytest.mark.parametrize("damage", ["gone", "shape", "dtype", "number of elements"])
def test_reverting_refuses_a_target_of_another_form(name, damage):
    """A tensor of each kind is missing, or has other sizes or another dtype of as many bits."""
    base, tuned, delta = several()
    target = copied(tuned)
    if damage == "gone":
        del target[name]
    elif damage == "shape":
        target[name] = target[name][None]
    elif damage == "dtype":
        target[name] = target[name].view(INT_OF[target[name].element_size()])
    else:
        target[name] = target[name][:1].clone()
    before = copied(target)
    with pytest.raises(ValueError, match=f"target's '{name}' must be .*, got "):
        delta.revert_(target, base)
    assert equal(target, before)


NAMES = ("a/b/w", "/", "values/x", "mask/dense/values", "/mask", "", " ", 'é"\\\n😀', "w" * 5000)


def test_names_of_any_kind_survive_a_file(tmp_path):
    """In part changed, whole and new: the kinds of a file's tensors are told by a prefix of their names."""
    base = {name: torch.arange(100.0) + i for i, name in enumerate(NAMES)}
    tuned = copied(base)
    for i, name in enumerate(NAMES):
        tuned[name][3 if i % 2 else slice(None)] = -1
    tuned |= {f"new/{name}": torch.ones(2) for name in NAMES}
    ChildDelta.from_models(base, tuned).save(tmp_path / "d")
    target = copied(base)
    delta = ChildDelta.load(tmp_path / "d")
    delta.apply_(target)
    assert equal(target, tuned)
    delta.revert_(target, base)
    assert equal(target, base)


def test_memory_that_only_touches_or_is_not_written():
    base = {"a": torch.arange(8.0), "b": torch.arange(8.0, 16.0), "c": torch.full((5,), 3.0)}
    tuned = copied(base)
    tuned["a"][7], tuned["b"][0] = -1, -2
    memory = torch.arange(16.0)
    target = {"a": memory[:8], "b": memory[8:], "c": torch.tensor(3.0).expand(5)}
    delta = ChildDelta.from_models(base, tuned)
    delta.apply_(target)
    assert equal(target, tuned)
    delta.revert_(target, base)
    assert equal(target, base) and memory.equal(torch.arange(16.0))


@pytest.mark.parametrize("changed_name", ["whole", "first", "last"])
def test_memory_inside_memory_is_refused_wherever_it_lies(changed_name):
    """A long tensor reaches over the next ones in memory: each is compared with it, not with its neighbour."""
    memory = torch.arange(40.0)
    target = {"whole": memory, "first": memory[1:5], "last": memory[30:34]}
    base = copied(target)
    tuned = copied(base)
    tuned[changed_name][2] = -1
    delta = ChildDelta.from_models(base, tuned)
    with pytest.raises(ValueError, match="must be in memory of its own: they become different, got .memory of"):
        delta.apply_(target)
    assert memory.equal(torch.arange(40.0))


def test_reverting_refuses_memory_that_becomes_different():
    """Two tensors that became equal lie in one place; what leaves with the revert may lie anywhere."""
    base = {"a": torch.arange(8.0), "b": torch.arange(8.0) + 1}
    ones = torch.ones(8)
    delta = ChildDelta.from_models(base, {"a": torch.ones(8), "b": torch.ones(8), "new": torch.ones(8)})
    with pytest.raises(ValueError, match="target's 'b' must be in memory of its own: they become different"):
        delta.revert_({"a": ones, "b": ones, "new": torch.ones(8)}, base)
    assert ones.eq(1).all()
    target = {"a": ones, "b": torch.ones(8), "new": ones}
    delta.revert_(target, base)
    assert equal(target, base)


def test_merging_counts_and_completes():
    base = {"w": torch.arange(200.0), "v": torch.zeros(5)}
    (low, _), (high, _) = of(base, slice(0, 120), -1.0), of(base, slice(100, 200), -1.0)
    merged = ChildDelta.merge([low, high])
    assert set(merged.dense) == {"w"} and not merged.values and merged.base_nbytes == low.base_nbytes == 4 * 205
    assert merged.dense["w"].equal(torch.full((200,), -1.0))
    three = [of(base, [1, 2, position], value)[0] for position, value in ((3, -1.0), (4, -2.0), (5, -3.0))]
    with pytest.raises(ValueError, match=r"by tensor: \{'w': 4\}"):  # two of the second's values, two of the third's
        ChildDelta.merge(three)
    new = [ChildDelta.from_models(base, {**base, name: torch.ones(2)}) for name in ("y", "x")]
    assert ChildDelta.merge(new).added == ["x", "y"]
    assert pieces(ChildDelta.merge(new), added=["y", "x"]).added == ["x", "y"]
    with pytest.raises(ValueError, match=r"deltas must be of one base, got \["):
        ChildDelta.merge([low, ChildDelta.from_models({"w": base["w"]}, {"w": base["w"]})])
