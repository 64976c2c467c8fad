// One launch for many tensors, without a table upload: tensor records travel by value in the kernel's parameters, so a
// step needs no copy, no allocation it must wait for, and can be captured in a CUDA graph as it is.
#pragma once

#include <vector>

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"

namespace childtune {

constexpr int kThreads = 128;
constexpr int kGroup = 4;                          // elements of one counter, and of one 16-byte access
constexpr int kGroupsPerThread = 2;                // independent loads in flight
constexpr int kTile = kThreads * kGroup * kGroupsPerThread;  // elements of one block
constexpr size_t kTableBytes = 32000;              // of the 32,764 that sm_70 and later take as parameters

template <typename Record>
struct Table {
  static constexpr int kCapacity = kTableBytes / sizeof(Record);
  int size;
  Record records[kCapacity];  // Record::first_block ascends
};

inline unsigned blocks_for(int64_t numel, int per_block) {
  return static_cast<unsigned>((numel + per_block - 1) / per_block);
}

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline cudaStream_t current_stream(const Tensor& tensor) { return current_stream(tensor.get_device_index()); }

// The record whose tensor a block works on. Every thread of the block walks the same path through constant memory.
template <typename Record>
__device__ const Record& find_record(const Table<Record>& table) {
  int low = 0, high = table.size - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.records[middle].first_block <= blockIdx.x) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return table.records[low];
}

// Calls launch(table, blocks) as often as the records need. Record::numel elements take blocks of `tile`; empty tensors
// take none.
template <int tile = kTile, typename Record, typename Launch>
void launch_tables(const std::vector<Record>& records, const Launch& launch) {
  Table<Record> table;
  table.size = 0;
  unsigned blocks = 0;
  const auto flush = [&] {
    if (table.size == 0) return;
    launch(table, blocks);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    table.size = 0;
    blocks = 0;
  };
  for (const Record& record : records) {
    if (record.numel == 0) continue;
    table.records[table.size] = record;
    table.records[table.size].first_block = blocks;
    blocks += blocks_for(record.numel, tile);
    if (++table.size == Table<Record>::kCapacity) flush();
  }
  flush();
}

// kGroup consecutive elements, one access wide where their address allows it.
template <typename T>
struct alignas(kGroup * sizeof(T)) Group {
  T values[kGroup];
};

// Of 16- and 32-bit elements.
inline bool is_aligned(const Array& array) {
  const bool wide = array.dtype == ScalarType::Float || array.dtype == ScalarType::Int;
  return reinterpret_cast<uintptr_t>(array.data) % (kGroup * (wide ? 4 : 2)) == 0;
}

inline bool is_aligned(const Tensor& tensor) { return is_aligned(array_of(tensor)); }

template <typename T>
__device__ void load_group(const T* data, int64_t start, int n, bool aligned, float (&values)[kGroup]) {
  if (aligned && n == kGroup) {
    const Group<T> group = *reinterpret_cast<const Group<T>*>(data + start);
    for (int j = 0; j < kGroup; ++j) values[j] = static_cast<float>(group.values[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) values[j] = j < n ? static_cast<float>(data[start + j]) : 0.0f;
  }
}

template <typename Value, typename T>
__device__ void store_group(const Value (&values)[kGroup], T* data, int64_t start, int n, bool aligned) {
  if (aligned && n == kGroup) {
    Group<T> group;
    for (int j = 0; j < kGroup; ++j) group.values[j] = static_cast<T>(values[j]);
    *reinterpret_cast<Group<T>*>(data + start) = group;
  } else {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      if (j < n) data[start + j] = static_cast<T>(values[j]);
    }
  }
}

}  // namespace childtune
