// The ops of one compiled library, as childtune_kernels/ops/__init__.py declares them: cpu/ and cuda/ define them.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include <torch/csrc/stable/tensor.h>

namespace childtune {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;

void adamw_(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
            const Tensors& steps, const Tensor& hyper, const Tensors& companions,
            const std::vector<int64_t>& rounding_keys, const Tensors& lrs, const MaybeTensor& grad_scale,
            const MaybeTensor& found_inf, const MaybeTensor& grad_norm);

void adamw_bernoulli_(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
                      const Tensors& exp_avg_sqs, const Tensors& steps, const Tensor& hyper,
                      const std::vector<int64_t>& keys, const Tensors& companions,
                      const std::vector<int64_t>& rounding_keys, const Tensors& lrs, const MaybeTensor& grad_scale,
                      const MaybeTensor& found_inf, const MaybeTensor& grad_norm);

void adamw_masked_(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                   const Tensors& steps, const Tensor& hyper, const Tensors& mask_words, bool decay_all,
                   const Tensors& lrs, const MaybeTensor& grad_scale, const MaybeTensor& found_inf,
                   const MaybeTensor& grad_norm);

void adamw_compact_(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
                    const Tensors& exp_avg_sqs, const Tensors& steps, const Tensor& hyper, const Tensors& indices,
                    const std::vector<int64_t>& keys, const Tensors& companions,
                    const std::vector<int64_t>& rounding_keys, const Tensors& lrs, const MaybeTensor& grad_scale,
                    const MaybeTensor& found_inf, const MaybeTensor& grad_norm);

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
