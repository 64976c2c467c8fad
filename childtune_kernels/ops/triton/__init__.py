"""The ops in Triton: CUDA tensors, or CPU tensors under TRITON_INTERPRET=1."""

from .bits import bernoulli_bits as bernoulli_bits
from .bits import overlap_bits as overlap_bits
from .bits import popcount_bits as popcount_bits
from .fisher import fisher_columns_ as fisher_columns_
from .fisher import fisher_linear_ as fisher_linear_
from .gather import gather_child_ as gather_child_
from .selection import score_histogram as score_histogram
from .selection import threshold_bits as threshold_bits
from .squares import square_accumulate_ as square_accumulate_
from .update import update_ as update_

NAME = "triton"
DIGITS = 4  # bits of a key that `score_histogram` counts at its best, by comparing in registers
