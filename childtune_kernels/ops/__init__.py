"""The ops: one schema a meaning, several implementations each; the only room that knows kernels exist.

Every implementation of an op gives bitwise the same weights, moments and masks. Schemas are Python strings, so
the package works, slower, with no compiler and no Triton:

    reference   eager torch, any device             reference/, the meaning of each op
    csrc        C++ on CPU, CUDA C++ on CUDA        ../../csrc, where it was built
    triton      CUDA (CPU under TRITON_INTERPRET=1)  triton/, where Triton is installed

`torch.ops.childtune.<op>` checks its arguments and runs the implementation measured fastest for the device.
`implementation(name, device)` gives one implementation's module, its functions unchecked: the optimizer, which has
checked, calls these with an `Update` that it keeps (a Python-registered op costs 0.4 us a tensor and list on top).
"""

import torch

from . import reference as reference
from .reference import pack_bits as pack_bits
from .reference import score_of_key as score_of_key
from .reference import unpack_bits as unpack_bits
from .registry import IMPLEMENTATIONS as IMPLEMENTATIONS
from .registry import OPS as OPS
from .registry import implementation as implementation
from .registry import mark_written as mark_written
from .registry import unavailable as unavailable
from .tensors import IntList as IntList
from .tensors import TensorList as TensorList
from .update import ADAMW as ADAMW
from .update import HYPER_COLUMNS as HYPER_COLUMNS
from .update import Rule as Rule
from .update import Scaling as Scaling
from .update import Update as Update

globals().update({name: getattr(torch.ops.childtune, name) for name in OPS})
