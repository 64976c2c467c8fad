// Compiled into both libraries: CHILDTUNE_DEVICE is the dispatch key, CPU or CUDA. Schemas belong to Python, which
// defines the `.csrc` overloads before it loads a library.
#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(childtune, CHILDTUNE_DEVICE, m) {
  m.impl("adamw_.csrc", TORCH_BOX(&childtune::adamw_));
  m.impl("adamw_bernoulli_.csrc", TORCH_BOX(&childtune::adamw_bernoulli_));
  m.impl("adamw_masked_.csrc", TORCH_BOX(&childtune::adamw_masked_));
  m.impl("adamw_compact_.csrc", TORCH_BOX(&childtune::adamw_compact_));
  m.impl("square_accumulate_.csrc", TORCH_BOX(&childtune::square_accumulate_));
  m.impl("bernoulli_bits.csrc", TORCH_BOX(&childtune::bernoulli_bits));
  m.impl("score_histogram.csrc", TORCH_BOX(&childtune::score_histogram));
  m.impl("threshold_bits.csrc", TORCH_BOX(&childtune::threshold_bits));
  m.impl("popcount_bits.csrc", TORCH_BOX(&childtune::popcount_bits));
  m.impl("overlap_bits.csrc", TORCH_BOX(&childtune::overlap_bits));
}
