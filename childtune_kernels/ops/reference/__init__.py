"""The eager meaning of every op, on any device: slow, readable, and bitwise what the kernels compute."""

from .bits import bernoulli_bits as bernoulli_bits
from .bits import overlap_bits as overlap_bits
from .bits import pack_bits as pack_bits
from .bits import popcount_bits as popcount_bits
from .bits import score_histogram as score_histogram
from .bits import score_keys as score_keys
from .bits import score_of_key as score_of_key
from .bits import threshold_bits as threshold_bits
from .bits import unpack_bits as unpack_bits
from .fisher import fisher_columns_ as fisher_columns_
from .fisher import fisher_linear_ as fisher_linear_
from .fisher import square_accumulate_ as square_accumulate_
from .gather import gather_child_ as gather_child_
from .update import update_ as update_

NAME = "reference"
DIGITS = 11  # bits of a key that `score_histogram` counts at its best
