"""The eager meaning of every op, on any device: slow, readable, and bitwise what the kernels compute."""

from .bits import MAX_DIGITS as MAX_DIGITS
from .bits import bernoulli_bits as bernoulli_bits
from .bits import overlap_bits as overlap_bits
from .bits import pack_bits as pack_bits
from .bits import popcount_bits as popcount_bits
from .bits import score_histogram as score_histogram
from .bits import score_keys as score_keys
from .bits import score_of_key as score_of_key
from .bits import threshold_bits as threshold_bits
from .bits import unpack_bits as unpack_bits
from .update import HYPER_COLUMNS as HYPER_COLUMNS
from .update import adamw_ as adamw_
from .update import adamw_bernoulli_ as adamw_bernoulli_
from .update import adamw_compact_ as adamw_compact_
from .update import adamw_masked_ as adamw_masked_
from .update import fisher_columns_ as fisher_columns_
from .update import fisher_linear_ as fisher_linear_
from .update import gather_child_ as gather_child_
from .update import square_accumulate_ as square_accumulate_
