"""Child-Tuning (Xu et al., EMNLP 2021) as fused kernels behind a torch optimizer.

Importing this imports nothing else: torch and the ops come with the first name that is used, so that
`childtune --help` need not wait for them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import ops
    from .delta import ChildDelta
    from .files import replacing
    from .fisher import Fisher, estimate_fisher
    from .mask import ChildMask, jaccard_matrix
    from .optim.adamw import ChildAdamW

__all__ = [
    "ChildAdamW",
    "ChildDelta",
    "ChildMask",
    "Fisher",
    "estimate_fisher",
    "jaccard_matrix",
    "ops",
    "replacing",
]
__version__ = "0.1.0"
_HOMES = {
    "ChildAdamW": "optim",
    "ChildDelta": "delta",
    "ChildMask": "mask",
    "Fisher": "fisher",
    "estimate_fisher": "fisher",
    "jaccard_matrix": "mask",
    "replacing": "files",
}


def __getattr__(name: str):
    """Import a public name, or a module of the package, when it is first used."""
    if name in _HOMES:
        globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        return globals()[name]
    module = f"{__name__}.{name}"
    try:
        if not name.startswith("_"):
            return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
