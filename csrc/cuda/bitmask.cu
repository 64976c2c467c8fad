// Packed masks: drawn from the stream, counted.
#include "../bitmask.h"

#include "launch.cuh"

namespace childtune {
namespace {

using torch::stable::accelerator::DeviceGuard;

constexpr int kCountBlocks = 1024;  // of the counting kernel, each striding over the whole mask

__device__ int64_t thread_index() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }

__global__ void bernoulli_kernel(uint32_t* out, int64_t numel, uint64_t first_quad, Stream stream, uint32_t last_kept) {
  const int64_t word = thread_index();
  if (word >= words_for(numel)) return;
  uint32_t bits = 0;
  for (int i = 0; i < kWordBits; i += 4) {
    uint32_t drawn[4];
    draw_quad(first_quad + (word * kWordBits + i) / 4, stream, drawn);
    for (int j = 0; j < 4; ++j) bits |= static_cast<uint32_t>(drawn[j] <= last_kept) << (i + j);
  }
  out[word] = bits & valid_bits(numel - word * kWordBits);
}

__device__ void add_over_warp(unsigned long long count, unsigned long long* total) {
  for (int lanes = warpSize / 2; lanes > 0; lanes /= 2) count += __shfl_down_sync(~0u, count, lanes);
  if (threadIdx.x % warpSize == 0) atomicAdd(total, count);
}

__global__ void popcount_kernel(const uint32_t* words, int64_t n, unsigned long long* total) {
  unsigned long long count = 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = thread_index(); i < n; i += stride) count += count_bits(words[i]);
  add_over_warp(count, total);
}

// counts: of a & b, of a | b. The first 4 * n_quads words are read 16 bytes at a time.
__global__ void overlap_kernel(const uint32_t* a, const uint32_t* b, int64_t n, int64_t n_quads,
                               unsigned long long* counts) {
  unsigned long long both = 0, either = 0;
  const auto add = [&](uint32_t x, uint32_t y) {
    both += count_bits(x & y);
    either += count_bits(x | y);
  };
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = thread_index(); i < n_quads; i += stride) {
    const uint4 x = reinterpret_cast<const uint4*>(a)[i], y = reinterpret_cast<const uint4*>(b)[i];
    add(x.x, y.x);
    add(x.y, y.y);
    add(x.z, y.z);
    add(x.w, y.w);
  }
  for (int64_t i = kGroup * n_quads + thread_index(); i < n; i += stride) add(a[i], b[i]);
  add_over_warp(both, counts);
  add_over_warp(either, counts + 1);
}

}  // namespace

void bernoulli_bits(const Tensor& words, int64_t numel, int64_t key, int64_t step, double p, int64_t domain,
                    int64_t offset) {
  check_bernoulli(words, numel);
  if (numel == 0) return;
  const DeviceGuard guard(words.get_device_index());
  const Stream stream = make_stream(key, static_cast<uint32_t>(step), static_cast<uint32_t>(domain));
  bernoulli_kernel<<<blocks_for(words_for(numel), kThreads), kThreads, 0, current_stream(words)>>>(
      static_cast<uint32_t*>(words.mutable_data_ptr()), numel, static_cast<uint64_t>(offset) / 4, stream,
      last_kept_word(p));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor popcount_bits(const Tensor& words) {
  check_words(words);
  const DeviceGuard guard(words.get_device_index());
  const cudaStream_t stream = current_stream(words);
  const Tensor total = torch::stable::new_empty(words, {}, ScalarType::Long);
  auto* const count = static_cast<unsigned long long*>(total.mutable_data_ptr());
  STD_CUDA_CHECK(cudaMemsetAsync(count, 0, sizeof(*count), stream));
  if (words.numel() == 0) return total;
  const unsigned blocks = std::min<unsigned>(kCountBlocks, blocks_for(words.numel(), kThreads));
  popcount_kernel<<<blocks, kThreads, 0, stream>>>(static_cast<const uint32_t*>(words.const_data_ptr()), words.numel(),
                                                   count);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return total;
}

Tensor overlap_bits(const Tensor& a, const Tensor& b) {
  check_overlap(a, b);
  const DeviceGuard guard(a.get_device_index());
  const cudaStream_t stream = current_stream(a);
  const Tensor result = torch::stable::new_empty(a, {2}, ScalarType::Long);
  auto* const counts = static_cast<unsigned long long*>(result.mutable_data_ptr());
  STD_CUDA_CHECK(cudaMemsetAsync(counts, 0, 2 * sizeof(*counts), stream));
  const int64_t n = a.numel();
  if (n == 0) return result;
  const int64_t n_quads = is_aligned(a) && is_aligned(b) ? n / kGroup : 0;
  const unsigned blocks = std::min<unsigned>(kCountBlocks, blocks_for(n, kThreads));
  overlap_kernel<<<blocks, kThreads, 0, stream>>>(static_cast<const uint32_t*>(a.const_data_ptr()),
                                                  static_cast<const uint32_t*>(b.const_data_ptr()), n, n_quads, counts);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

}  // namespace childtune
