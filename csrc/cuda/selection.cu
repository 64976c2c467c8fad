// The child network by score: histograms of the scores' keys, and the bits beyond a threshold; one launch each for all
// tensors of a dtype.
#include "../score.h"

#include "launch.cuh"

namespace childtune {
namespace {

using torch::stable::accelerator::DeviceGuard;

constexpr int kCountThreads = 512;
constexpr int kCountTile = 1 << 16;  // elements of one block, which clears and adds up all its bins
constexpr int kLoads = 4;            // groups a thread has in flight
// Scores sit in few exponents, so lanes of a warp often meet in a bin, and always where many scores are 0. Copies of a
// bin lie in neighbouring banks, and a lane adds to its own: at most 8 lanes meet.
constexpr int kCopies = 4;

struct CountRecord {
  const void* scores;
  unsigned long long* counts;  // [bins + 1]
  int64_t numel;
  uint32_t first;
  unsigned first_block;
  bool aligned;
};

struct BitsRecord {
  const void* scores;
  uint32_t* words;
  int64_t numel, tie_end;
  float threshold;
  unsigned first_block;
};

template <typename T>
__global__ void __launch_bounds__(kCountThreads)
    count_kernel(const __grid_constant__ Table<CountRecord> table, int shift, uint32_t bins) {
  __shared__ uint32_t copies[((1 << kMaxDigits) + 1) * kCopies];
  for (uint32_t i = threadIdx.x; i < (bins + 1) * kCopies; i += kCountThreads) copies[i] = 0;
  __syncthreads();

  const CountRecord& r = find_record(table);
  const int64_t tile = static_cast<int64_t>(blockIdx.x - r.first_block) * kCountTile;
  const int64_t end = r.numel - tile < kCountTile ? r.numel : tile + kCountTile;
  const uint32_t copy = threadIdx.x % kCopies;
  for (int64_t start = tile + threadIdx.x * kGroup; start < end; start += kLoads * kCountThreads * kGroup) {
    float score[kLoads][kGroup];
    int n[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int64_t at = start + k * kCountThreads * kGroup;
      n[k] = at >= end ? 0 : end - at < kGroup ? static_cast<int>(end - at) : kGroup;
      load_group(static_cast<const T*>(r.scores), at, n[k], r.aligned, score[k]);
    }
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const uint32_t bin = score_bin(score[k][j], r.first, shift, bins);
        if (j < n[k] && bin <= bins) atomicAdd(&copies[bin * kCopies + copy], 1u);
      }
    }
  }

  __syncthreads();
  for (uint32_t bin = threadIdx.x; bin <= bins; bin += kCountThreads) {
    unsigned long long count = 0;
    for (int i = 0; i < kCopies; ++i) count += copies[bin * kCopies + i];
    if (count != 0) atomicAdd(r.counts + bin, count);
  }
}

// One warp a word: lane i votes for bit i.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    bits_kernel(const __grid_constant__ Table<BitsRecord> table, bool lowest) {
  const BitsRecord& r = find_record(table);
  const int64_t tile = static_cast<int64_t>(blockIdx.x - r.first_block) * kTile;
  float score[kTile / kThreads];
#pragma unroll
  for (int k = 0; k < kTile / kThreads; ++k) {
    const int64_t i = tile + k * kThreads + threadIdx.x;
    score[k] = i < r.numel ? static_cast<float>(static_cast<const T*>(r.scores)[i]) : 0.0f;
  }
#pragma unroll
  for (int k = 0; k < kTile / kThreads; ++k) {
    const int64_t i = tile + k * kThreads + threadIdx.x;
    const uint32_t bits =
        __ballot_sync(~0u, i < r.numel && is_selected(score[k], r.threshold, i < r.tie_end, lowest));
    if (i < r.numel && i % kWordBits == 0) r.words[i / kWordBits] = bits;
  }
}

}  // namespace

Tensor score_histogram(const Tensors& scores, const std::vector<int64_t>& firsts, int64_t shift, int64_t digits) {
  check_histogram(scores, firsts, shift, digits);
  const DeviceGuard guard(scores[0].get_device_index());
  const cudaStream_t stream = current_stream(scores[0]);
  const uint32_t bins = 1u << digits;
  const Tensor result =
      torch::stable::new_empty(scores[0], {static_cast<int64_t>(scores.size()), bins + 1}, ScalarType::Long);
  auto* const counts = static_cast<unsigned long long*>(result.mutable_data_ptr());
  STD_CUDA_CHECK(cudaMemsetAsync(counts, 0, result.numel() * sizeof(*counts), stream));
  for (const ScalarType dtype : {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half}) {
    std::vector<CountRecord> records;
    for (size_t i = 0; i < scores.size(); ++i) {
      if (scores[i].scalar_type() != dtype) continue;
      records.push_back({scores[i].const_data_ptr(), counts + i * (bins + 1), scores[i].numel(),
                         static_cast<uint32_t>(firsts[i]), 0, is_aligned(scores[i])});
    }
    dispatch_weights(dtype, [&](auto zero) {
      const auto kernel = count_kernel<decltype(zero)>;
      launch_tables<kCountTile>(records, [&](const Table<CountRecord>& table, unsigned blocks) {
        kernel<<<blocks, kCountThreads, 0, stream>>>(table, static_cast<int>(shift), bins);
      });
    });
  }
  return result;
}

Tensor threshold_bits(const Tensors& scores, const std::vector<double>& thresholds,
                      const std::vector<int64_t>& tie_ends, bool lowest) {
  check_thresholds(scores, thresholds, tie_ends);
  const DeviceGuard guard(scores[0].get_device_index());
  const cudaStream_t stream = current_stream(scores[0]);
  const std::vector<int64_t> starts = first_words(scores);
  const Tensor words = torch::stable::new_empty(scores[0], {starts.back()}, ScalarType::Int);
  auto* const out = static_cast<uint32_t*>(words.mutable_data_ptr());
  for (const ScalarType dtype : {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half}) {
    std::vector<BitsRecord> records;
    for (size_t i = 0; i < scores.size(); ++i) {
      if (scores[i].scalar_type() != dtype) continue;
      records.push_back({scores[i].const_data_ptr(), out + starts[i], scores[i].numel(), tie_ends[i],
                         static_cast<float>(thresholds[i]), 0});  // 16-bit scores are compared in fp32 too
    }
    dispatch_weights(dtype, [&](auto zero) {
      const auto kernel = bits_kernel<decltype(zero)>;
      launch_tables(records, [&](const Table<BitsRecord>& table, unsigned blocks) {
        kernel<<<blocks, kThreads, 0, stream>>>(table, lowest);
      });
    });
  }
  return words;
}

}  // namespace childtune
