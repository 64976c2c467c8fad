"""Child-Tuning (Xu et al., EMNLP 2021) as fused kernels behind a torch optimizer."""

from . import ops
from .mask import ChildMask, jaccard_matrix
from .optim import ChildAdamW

__all__ = ["ChildAdamW", "ChildMask", "jaccard_matrix", "ops"]
__version__ = "0.1.0"
