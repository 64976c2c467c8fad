"""Child-Tuning (Xu et al., EMNLP 2021) as fused kernels behind a torch optimizer."""

from . import ops
from .fisher import Fisher, estimate_fisher
from .mask import ChildMask, jaccard_matrix
from .optim import ChildAdamW
from .selection import random_child

__all__ = ["ChildAdamW", "ChildMask", "Fisher", "estimate_fisher", "jaccard_matrix", "ops", "random_child"]
__version__ = "0.1.0"
