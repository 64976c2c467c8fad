// accumulator = accumulator + (grad * grad) * scale: one term of Eq. 10, one launch for all tensors of a dtype.
#include "launch.cuh"

namespace childtune {
namespace {

struct SquareRecord {
  float* accumulator;
  const void* grad;
  int64_t numel;
  unsigned first_block;
  bool grad_aligned, accumulator_aligned;
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    square_kernel(const __grid_constant__ Table<SquareRecord> table, float scale) {
  const SquareRecord& r = find_record(table);
  const int64_t tile = static_cast<int64_t>(blockIdx.x - r.first_block) * kTile;
#pragma unroll
  for (int k = 0; k < kGroupsPerThread; ++k) {
    const int64_t start = tile + (k * kThreads + threadIdx.x) * kGroup;
    if (start >= r.numel) return;
    const int n = r.numel - start < kGroup ? static_cast<int>(r.numel - start) : kGroup;
    float grad[kGroup], sum[kGroup];
    load_group(static_cast<const T*>(r.grad), start, n, r.grad_aligned, grad);
    load_group(r.accumulator, start, n, r.accumulator_aligned, sum);
    for (int j = 0; j < kGroup; ++j) sum[j] = add_square(sum[j], grad[j], scale);
    store_group(sum, r.accumulator, start, n, r.accumulator_aligned);
  }
}

}  // namespace

void square_accumulate_(const Tensors& accumulators, const Tensors& grads, double scale) {
  check_accumulate(accumulators, grads);
  if (accumulators.empty()) return;
  const torch::stable::accelerator::DeviceGuard guard(accumulators[0].get_device_index());
  const cudaStream_t stream = current_stream(accumulators[0]);
  for (const ScalarType dtype : {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half}) {
    std::vector<SquareRecord> records;
    for (size_t i = 0; i < grads.size(); ++i) {
      if (grads[i].scalar_type() != dtype) continue;
      records.push_back({static_cast<float*>(accumulators[i].mutable_data_ptr()), grads[i].const_data_ptr(),
                         grads[i].numel(), 0, is_aligned(grads[i]), is_aligned(accumulators[i])});
    }
    dispatch_weights(dtype, [&](auto zero) {
      const auto kernel = square_kernel<decltype(zero)>;
      launch_tables(records, [&](const Table<SquareRecord>& table, unsigned blocks) {
        kernel<<<blocks, kThreads, 0, stream>>>(table, static_cast<float>(scale));
      });
    });
  }
}

}  // namespace childtune
