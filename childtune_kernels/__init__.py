"""Child-Tuning (Xu et al., EMNLP 2021) as fused kernels behind a torch optimizer."""

from . import ops
from .delta import ChildDelta
from .files import replacing
from .fisher import Fisher, estimate_fisher
from .mask import ChildMask, jaccard_matrix
from .optim import ChildAdamW

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
