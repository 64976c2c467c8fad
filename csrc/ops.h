// The ops of one compiled library, as childtune_kernels/ops/__init__.py declares them: cpu/ and cuda/ define them.
#pragma once

#include <cstdint>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "update.h"

namespace childtune {

using Tensors = std::vector<Tensor>;

void update_(const UpdateLists& lists);

void square_accumulate_(const Tensors& accumulators, const Tensors& grads, double scale);

// Fills `words`, since an op without a tensor argument has no device to be dispatched on.
void bernoulli_bits(const Tensor& words, int64_t numel, int64_t key, int64_t step, double p, int64_t domain,
                    int64_t offset);

Tensor score_histogram(const Tensors& scores, const std::vector<int64_t>& firsts, int64_t shift, int64_t digits);

Tensor threshold_bits(const Tensors& scores, const std::vector<double>& thresholds,
                      const std::vector<int64_t>& tie_ends, bool lowest);

Tensor popcount_bits(const Tensor& words);

Tensor overlap_bits(const Tensor& a, const Tensor& b);

}  // namespace childtune
