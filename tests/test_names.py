"""Canonical names: a wrapped model's are the bare model's."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from childtune_kernels import names

BARE = ["0.weight", "0.bias", "1.weight", "1.bias"]


class DataParallel(nn.Module):
    """Names as DistributedDataParallel has them, without its process group."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))


def wrapped():
    inner = nn.Sequential(checkpoint_wrapper(nn.Linear(3, 3)), nn.Linear(3, 3))
    yield torch.compile(model())
    yield DataParallel(model())
    yield DataParallel(torch.compile(model()))
    yield torch.compile(DataParallel(model()))
    yield DataParallel(DataParallel(model()))
    yield inner
    yield torch.compile(inner)


@pytest.mark.parametrize("index", range(7))
def test_wrapped_models_have_the_bare_names(index):
    own = list(wrapped())[index]
    assert [name for name, _ in own.named_parameters()] != BARE
    named = names.named_parameters(own)
    assert list(named) == BARE
    assert all(a is b for a, b in zip(named.values(), own.parameters(), strict=True))


def test_a_bare_model_with_a_part_called_module_has_one_name_wrapped_or_not():
    for own in (DataParallel(model()), DataParallel(DataParallel(model()))):
        assert list(names.named_parameters(own)) == BARE
    assert names.canonical(["module.a", "head.b"]) == ["module.a", "head.b"]
    assert names.canonical(["a.module.w", "a.b"]) == ["a.module.w", "a.b"]


def test_only_whole_components_are_taken_off():
    kept = ["my_orig_mod.w", "_orig_mode.w", "modules.w", "module"]
    assert names.canonical(kept) == kept
    assert names.canonical([]) == []


def test_names_that_become_one_are_refused():
    with pytest.raises(ValueError, match="names must differ .* got 'a.w' more than once"):
        names.canonical(["a._orig_mod.w", "a.w"])


def test_matching_finds_a_name_wrapped_or_not():
    assert names.matching("module._orig_mod.0.weight", BARE) == "0.weight"
    assert names.matching("module.a", ["module.a"]) == "module.a"
    assert names.matching("2.weight", BARE) is None


def test_long_lists_are_cut():
    assert names.listed([str(i) for i in range(12)], shown=2) == "'0', '1' and 10 more"
    assert names.listed(["a"]) == "'a'"
