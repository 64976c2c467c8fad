// The child network by score: histograms of the scores' keys, and the bits beyond a threshold.
#include "../score.h"

#include <array>
#include <mutex>

#include "../checks.h"
#include "parallel.h"

namespace childtune {
namespace {

std::vector<int64_t> numels_of(const Tensors& tensors) {
  std::vector<int64_t> numels;
  for (const Tensor& tensor : tensors) numels.push_back(tensor.numel());
  return numels;
}

}  // namespace

Tensor score_histogram(const Tensors& scores, const std::vector<int64_t>& firsts, int64_t shift, int64_t digits) {
  check_histogram(scores, firsts, shift, digits);
  const uint32_t bins = 1u << digits;
  const Tensor result =
      torch::stable::new_empty(scores[0], {static_cast<int64_t>(scores.size()), bins + 1}, ScalarType::Long);
  auto* const counts = static_cast<int64_t*>(result.mutable_data_ptr());
  std::fill_n(counts, result.numel(), 0);
  std::mutex counts_mutex;
  parallel_elements(numels_of(scores), [&](size_t i, int64_t first, int64_t last) {
    std::array<int64_t, (1 << kMaxDigits) + 2> own{};
    const auto first_key = static_cast<uint32_t>(firsts[i]);
    dispatch_weights(scores[i].scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      const auto* score = static_cast<const T*>(scores[i].const_data_ptr());
      for (int64_t j = first; j < last; ++j) {
        ++own[score_bin(static_cast<float>(score[j]), first_key, static_cast<int>(shift), bins)];
      }
    });
    const std::lock_guard<std::mutex> lock(counts_mutex);
    for (uint32_t bin = 0; bin <= bins; ++bin) counts[i * (bins + 1) + bin] += own[bin];
  });
  return result;
}

Tensor threshold_bits(const Tensors& scores, const std::vector<double>& thresholds,
                      const std::vector<int64_t>& tie_ends, bool lowest) {
  check_thresholds(scores, thresholds, tie_ends);
  const std::vector<int64_t> numels = numels_of(scores);
  const std::vector<int64_t> starts = first_words(scores);
  const Tensor words = torch::stable::new_empty(scores[0], {starts.back()}, ScalarType::Int);
  auto* const out = static_cast<uint32_t*>(words.mutable_data_ptr());
  parallel_elements(numels, [&](size_t t, int64_t first, int64_t last) {
    const auto threshold = static_cast<float>(thresholds[t]);  // 16-bit scores are compared in fp32 too
    dispatch_weights(scores[t].scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      const auto* score = static_cast<const T*>(scores[t].const_data_ptr());
      for (int64_t start = first; start < last; start += kWordBits) {
        const int n = static_cast<int>(std::min<int64_t>(kWordBits, last - start));
        uint32_t bits = 0;
        for (int i = 0; i < n; ++i) {
          const bool takes_ties = start + i < tie_ends[t];
          bits |= static_cast<uint32_t>(
                      is_selected(static_cast<float>(score[start + i]), threshold, takes_ties, lowest))
                  << i;
        }
        out[starts[t] + start / kWordBits] = bits;
      }
    });
  });
  return words;
}

}  // namespace childtune
