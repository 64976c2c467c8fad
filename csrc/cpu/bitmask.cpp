// Packed masks: drawn from the stream, counted.
#include "../bitmask.h"

#include <atomic>

#include "../checks.h"
#include "parallel.h"

namespace childtune {

void bernoulli_bits(const Tensor& words, int64_t numel, int64_t key, int64_t step, double p, int64_t domain,
                    int64_t offset) {
  check_bernoulli(words, numel);
  const Stream stream = make_stream(key, static_cast<uint32_t>(step), static_cast<uint32_t>(domain));
  auto* out = static_cast<uint32_t*>(words.mutable_data_ptr());
  parallel_elements({numel}, [&](size_t, int64_t first, int64_t last) {
    const uint64_t first_quad = static_cast<uint64_t>(offset + first) / 4;
    loops().bernoulli_words(out + first / kWordBits, last - first, first_quad, stream, last_kept_word(p));
  });
}

Tensor popcount_bits(const Tensor& words) {
  check_words(words);
  const auto* data = static_cast<const uint32_t*>(words.const_data_ptr());
  std::atomic<int64_t> total{0};
  parallel_elements({words.numel()}, [&](size_t, int64_t first, int64_t last) {
    int64_t count = 0;
#pragma omp simd reduction(+ : count)
    for (int64_t i = first; i < last; ++i) count += count_bits(data[i]);
    total += count;
  });
  const Tensor result = torch::stable::new_empty(words, {}, ScalarType::Long);
  *static_cast<int64_t*>(result.mutable_data_ptr()) = total;
  return result;
}

Tensor overlap_bits(const Tensor& a, const Tensor& b) {
  check_overlap(a, b);
  const auto* x = static_cast<const uint32_t*>(a.const_data_ptr());
  const auto* y = static_cast<const uint32_t*>(b.const_data_ptr());
  std::atomic<int64_t> both{0}, either{0};
  parallel_elements({a.numel()}, [&](size_t, int64_t first, int64_t last) {
    int64_t in_both = 0, in_either = 0;
#pragma omp simd reduction(+ : in_both, in_either)
    for (int64_t i = first; i < last; ++i) {
      in_both += count_bits(x[i] & y[i]);
      in_either += count_bits(x[i] | y[i]);
    }
    both += in_both;
    either += in_either;
  });
  const Tensor result = torch::stable::new_empty(a, {2}, ScalarType::Long);
  auto* const counts = static_cast<int64_t*>(result.mutable_data_ptr());
  counts[0] = both;
  counts[1] = either;
  return result;
}

}  // namespace childtune
