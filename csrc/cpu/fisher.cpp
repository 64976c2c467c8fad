// accumulator = accumulator + (grad * grad) * scale: one term of Eq. 10. Bound by memory in any instruction set.
#include "../checks.h"
#include "parallel.h"

namespace childtune {
namespace {

template <typename T>
void accumulate(float* accumulator, const T* grad, int64_t first, int64_t last, float scale) {
#pragma omp simd
  for (int64_t i = first; i < last; ++i) {
    accumulator[i] = add_square(accumulator[i], static_cast<float>(grad[i]), scale);
  }
}

}  // namespace

void square_accumulate_(const Tensors& accumulators, const Tensors& grads, double scale) {
  check_accumulate(accumulators, grads);
  std::vector<int64_t> numels;
  for (const Tensor& accumulator : accumulators) numels.push_back(accumulator.numel());
  parallel_elements(numels, [&](size_t i, int64_t first, int64_t last) {
    auto* accumulator = static_cast<float*>(accumulators[i].mutable_data_ptr());
    dispatch_weights(grads[i].scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      accumulate(accumulator, static_cast<const T*>(grads[i].const_data_ptr()), first, last, static_cast<float>(scale));
    });
  });
}

}  // namespace childtune
