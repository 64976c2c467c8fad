"""Which parameters a Fisher pass estimates, and which of them are the pretrained part that a child network masks."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .. import names as naming
from ..errors import require

# Heads that are pretrained with the rest; others, beside a base model, are made anew for a task.
_PRETRAINED_HEAD = re.compile(r"For(PreTraining|Masked|CausalLM|ConditionalGeneration|NextSentence)|LMHead")
_TASK_HEAD = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice)")
_SAVED = "modules_to_save"  # PEFT's component in the names of what it trains fully beside its adapters
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def chosen(model: nn.Module, include: Iterable[str] | None, exclude: Iterable[str]) -> dict[str, Tensor]:
    """Return canonical name -> parameter for those to estimate; a tied parameter goes by its first name.

    Raises:
        ValueError: parameters that are no whole, ordinary tensors; names that the model does not have, or frozen
            ones, in ``include``; nothing is left; a parameter whose dtype has no squared gradient.
    """
    _require_whole(model)
    named = naming.named_parameters(model)
    exclude = set(_known(model, named, "exclude", exclude))
    wanted = list(named) if include is None else _known(model, named, "include", include)
    frozen = [name for name in wanted if not named[name].requires_grad]
    _refuse("include", frozen if include is not None else [], "parameters with requires_grad=True")
    expected = f"a model with parameters to estimate: all of its {len(named)} are frozen (requires_grad=False)"
    require("model", type(model).__name__, len(frozen) < len(named), expected)
    params = {name: named[name] for name in wanted if name not in exclude and named[name].requires_grad}
    require("include and exclude", [], params, "names that leave a parameter to estimate")
    odd = [f"{name}: {p.dtype}" for name, p in params.items() if p.dtype not in _DTYPES]
    _refuse("exclude", odd, "names that leave out parameters of a dtype other than float16, bfloat16, 32 and 64")
    return params


def _known(model: nn.Module, named: dict[str, Tensor], argument: str, given: Iterable[str]) -> list[str]:
    """Return the canonical first names of some given names, which may be wrapped or a tied parameter's others."""
    require(argument, given, not isinstance(given, str), "a list of names, not one string")
    first = {id(p): name for name, p in named.items()}
    every = {name: first[id(p)] for name, p in naming.named_parameters(model, remove_duplicate=False).items()}
    found = {name: naming.matching(name, every) for name in given}
    unknown = [name for name, match in found.items() if match is None]
    _refuse(argument, unknown, "names of the model's parameters", f": it has {naming.listed(list(named))}")
    return list(dict.fromkeys(every[match] for match in found.values()))


def _require_whole(model: nn.Module) -> None:
    """Refuse parameters of which this process does not hold every element: their information would be 0."""
    sharded = [name for name, module in model.named_modules() if _is_a(module, "FullyShardedDataParallel")]
    _refuse("model", [name or type(model).__name__ for name in sharded],
            "a model before FullyShardedDataParallel wraps it: estimate first, shard then")  # fmt: skip
    empty = []
    for name, param in model.named_parameters():
        if _is_a(param, "DTensor"):
            empty.append(f"{name}: DTensor")
        elif isinstance(param, nn.parameter.UninitializedTensorMixin):
            empty.append(f"{name}: not initialised, run one batch first")
        elif tuple(getattr(param, "ds_shape", param.shape)) != tuple(param.shape):
            empty.append(f"{name}: a placeholder of DeepSpeed ZeRO-3")
        elif param.is_meta:
            empty.append(f"{name}: meta")
    _refuse("model", empty, "one whose parameters are whole, ordinary tensors of this process: estimate before "
            "fully_shard, parallelize_module, DeepSpeed or offloading, or on a copy with full weights")  # fmt: skip


def _is_a(value: object, kind: str) -> bool:
    """Say whether a value is of a class of that name: known without importing what may not be installed."""
    return any(base.__name__ == kind for base in type(value).__mro__)


def _refuse(argument: str, found: list[str], expected: str, hint: str = "") -> None:
    if found:
        raise ValueError(f"{argument} must be {expected}, got [{naming.listed(found)}]{hint}")


def warn_of_other_ranks() -> None:
    """Say that the estimate is of this rank's batches, where there are others."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if (ranks := torch.distributed.get_world_size()) > 1:
            warnings.warn(
                f"this is one of {ranks} ranks, and the Fisher information is that of its own batches: give every rank "
                "all batches, or all-reduce Fisher.sums and Fisher.count before choosing a child, or ranks choose "
                "different children",
                stacklevel=3,
            )


def left_out(model: nn.Module, params: dict[str, Tensor]) -> dict[str, int]:
    """Return name -> weights of what trains but is not estimated: no mask names it, so it is trained fully."""
    named = naming.named_parameters(model)
    return {name: p.numel() for name, p in named.items() if p.requires_grad and name not in params}


def backbone(model: nn.Module, params: dict[str, Tensor]) -> list[str]:
    """Return the names of the pretrained part: all but fresh heads; under PEFT, the adapters that are not in a head.

    A model that no transformers class is part of has no head that could be told from the rest.
    """
    fresh = {id(p) for part in _transformers(model) for p in _fresh_head(part)}
    names = [name for name, p in params.items() if id(p) not in fresh and _SAVED not in name.split(".")]
    if any(hasattr(module, "peft_config") for module in model.modules()):
        layers = {part for module in model.modules() for part in _adapter_parts(module)} - {_SAVED}
        adapters = [n for n in names if any(p in layers or p.startswith("lora_") for p in n.split("."))]
        return adapters or names
    return names


def _adapter_parts(module: nn.Module) -> list[str]:
    return [part for name in getattr(type(module), "adapter_layer_names", ()) for part in name.split(".")]


def _transformers(module: nn.Module) -> list[nn.Module]:
    """Return the outermost models of transformers; asked of classes, as wrappers forward attributes."""
    if isinstance(getattr(type(module), "base_model_prefix", None), str):
        return [module]
    return [model for child in module.children() for model in _transformers(child)]


def _fresh_head(model: nn.Module) -> list[Tensor]:
    """Return the parameters of a model of transformers that are outside its base model and made for a task."""
    kind, own = type(model).__name__, type(model).__module__.startswith("transformers.")
    if own and kind.endswith("Model"):  # DINOv3ViTModel and others have a part of the base model's name
        return []
    if _PRETRAINED_HEAD.search(kind) or _output_embeddings(model) is not None:
        return []
    base = getattr(model, model.base_model_prefix, None) if model.base_model_prefix else None
    if isinstance(base, nn.Module):
        parts = [base]
    else:  # T5ForQuestionAnswering and others have an encoder and a decoder, not a base model
        parts = [child for child in model.children() if _transformers(child)] if _TASK_HEAD.search(kind) else []
    pretrained = {id(p) for part in parts for p in part.parameters()}
    return [p for p in model.parameters() if parts and id(p) not in pretrained]


def _output_embeddings(model: nn.Module) -> object | None:
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
