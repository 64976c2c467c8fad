// Compiled into both libraries: CHILDTUNE_DEVICE is the dispatch key, CPU or CUDA. Schemas belong to Python, which
// defines the `.csrc` overloads before it loads a library.
#include <torch/csrc/stable/library.h>

#include "ops.h"

// TORCH_BOX would make a std::vector<Tensor> of every list: see Arrays.
template <typename Rule>
static void boxed_update(StableIValue* arguments, uint64_t given, uint64_t) {
  STD_TORCH_CHECK(given == childtune::UpdateLists::kArguments, "an update takes ", childtune::UpdateLists::kArguments,
                  " arguments, its schema has ", given);
  childtune::update_(childtune::UpdateLists(Rule{}, arguments));
}

STABLE_TORCH_LIBRARY_IMPL(childtune, CHILDTUNE_DEVICE, m) {
  m.impl("adamw_.csrc", boxed_update<childtune::AdamW>);
  m.impl("square_accumulate_.csrc", TORCH_BOX(&childtune::square_accumulate_));
  m.impl("bernoulli_bits.csrc", TORCH_BOX(&childtune::bernoulli_bits));
  m.impl("score_histogram.csrc", TORCH_BOX(&childtune::score_histogram));
  m.impl("threshold_bits.csrc", TORCH_BOX(&childtune::threshold_bits));
  m.impl("popcount_bits.csrc", TORCH_BOX(&childtune::popcount_bits));
  m.impl("overlap_bits.csrc", TORCH_BOX(&childtune::overlap_bits));
}
