"""Child-Tuning (Xu et al., EMNLP 2021) as fused kernels behind a torch optimizer."""

from . import ops
from .mask import ChildMask
from .optim import ChildAdamW

__all__ = ["ChildAdamW", "ChildMask", "ops"]
__version__ = "0.1.0"
