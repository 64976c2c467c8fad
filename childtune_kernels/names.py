"""Canonical parameter names: those of the bare model, whatever it is wrapped in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from torch import nn

# Components that torch.compile, FullyShardedDataParallel and activation checkpointing put into a name, anywhere.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_DATA_PARALLEL = "module."  # DistributedDataParallel's, before every name


def unwrapped(name: str) -> str:
    """Return a name without the components of wrappers; DistributedDataParallel's, known by all names, stays."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS) or name


def common_prefix(names: Iterable[str]) -> str:
    """Return the ``module.`` that every one of some unwrapped names begins with, as often as it does, or ""."""
    names, prefix = list(names), ""
    while names and all(name.startswith(prefix + _DATA_PARALLEL) for name in names):
        prefix += _DATA_PARALLEL
    return prefix


def canonical(names: Iterable[str]) -> list[str]:
    """Return the names that the bare model has, for all names of a model, or all of a mask.

    Raises:
        ValueError: two names become one.
    """
    given = list(names)
    bare = [unwrapped(name) for name in given]
    prefix = common_prefix(bare)
    result = [name.removeprefix(prefix) for name in bare]
    if len(set(result)) < len(set(given)):
        twice = [name for name, count in Counter(result).items() if count > 1]
        raise ValueError(f"names must differ when wrappers are taken off them, got {listed(twice)} more than once")
    return result


def named_parameters(model: nn.Module, remove_duplicate: bool = True) -> dict[str, nn.Parameter]:
    """Return canonical name -> parameter, in the model's order; as ``model.named_parameters``."""
    named = dict(model.named_parameters(remove_duplicate=remove_duplicate))
    return dict(zip(canonical(named), named.values(), strict=True))


def matching(name: str, known: Collection[str]) -> str | None:
    """Return which of some canonical names a name, wrapped or not, stands for; None if none."""
    bare = unwrapped(name)
    while bare not in known and bare.startswith(_DATA_PARALLEL):
        bare = bare.removeprefix(_DATA_PARALLEL)
    return bare if bare in known else None


def listed(names: Sequence[str], shown: int = 10) -> str:
    """Return the first names, quoted, and how many more there are: an error about a whole model must stay readable."""
    return shortened(list(map(repr, names)), shown)


def shortened(items: Sequence[str], shown: int = 10) -> str:
    """Return the first items, and how many more there are."""
    more = len(items) - shown
    return ", ".join(items[:shown]) + (f" and {more} more" if more > 0 else "")
