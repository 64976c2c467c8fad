// The update: one small kernel derives every parameter's scalars on the device and advances the step counters,
// then one launch updates all tensors of a dtype pair. No host synchronisation, safe to capture.
#include "../adamw.h"

#include "../bitmask.h"
#include "launch.cuh"

namespace childtune {
namespace {

enum class Mask { kNone, kBernoulli, kChild, kCompact };

struct ScalarRecord {
  double* step;
  const float* lr;  // null: the table's
  Hyper hyper;
};

struct UpdateRecord {
  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  const Scalars* scalars;
  int64_t mask_key;              // kBernoulli, and kCompact where it draws
  union {                        // null where the whole tensor is in the child
    const uint32_t* mask_words;  // kChild
    const int32_t* indices;      // kCompact
  };
  void* companion;        // of 16-bit weights: the fp32 master or, in the weight's dtype, the compensation; or null
  int64_t rounding_key;   // where `stochastic`
  int64_t numel;          // of the moments
  unsigned first_block;
  bool grad_aligned, state_aligned;  // state: param, exp_avg and exp_avg_sq
  bool decay_outside;                // kChild: of weights that the mask words leave out
  bool draws, grad_packed;           // kCompact: F's mask is drawn; gradients lie like moments
  bool is_master, stochastic;        // what the companion is; 16-bit weights are rounded stochastically
};

struct GradientState {
  const float *grad_scale, *found_inf, *grad_norm;  // each may be null
};

__device__ bool overflowed(const float* found_inf) { return found_inf && *found_inf != 0.0f; }

template <typename Rule>
__global__ void scalars_kernel(
    const __grid_constant__ Table<ScalarRecord> table, Scalars* scalars, GradientState state) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= table.size || overflowed(state.found_inf)) return;
  const ScalarRecord& record = table.records[i];
  const uint32_t t = next_step(*record.step);
  scalars[i] = derive_scalars<Rule>(t, record.hyper, record.lr, state.grad_scale, state.grad_norm);
  *record.step += 1.0;
}

// One bit an element of the group: is it in the child network? Bits outside the tensor do not matter.
__device__ uint32_t child_bits(const uint32_t* mask_words, int64_t start) {
  return mask_words ? mask_words[start / kWordBits] >> (start % kWordBits) & 0xFu : 0xFu;
}

// Replaces weights as stored by those that they stand for; `start` is where their companions are.
template <typename Weight>
__device__ void add_companions(const UpdateRecord& r, int64_t start, int n, float (&param)[kGroup]) {
  if (!r.companion) return;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    if (j >= n) break;
    const Weight stored = static_cast<Weight>(param[j]);  // exact: it was widened from there
    param[j] = r.is_master ? standing_weight(static_cast<const float*>(r.companion)[start + j], stored)
                           : compensated(stored, static_cast<const Weight*>(r.companion)[start + j]);
  }
}

// Rounds weights to their dtype, and keeps what that loses where there is a companion.
template <typename Weight>
__device__ void round_weights(const UpdateRecord& r, const float (&param)[kGroup], int64_t start, int n,
                              const uint32_t (&words)[kGroup], Weight (&rounded)[kGroup]) {
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    rounded[j] = static_cast<Weight>(param[j]);
    if (r.stochastic) round_stochastically(param[j], words[j], rounded[j]);
  }
  if (!r.companion) return;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    if (j >= n) break;
    if (r.is_master) {
      static_cast<float*>(r.companion)[start + j] = param[j];
    } else {
      static_cast<Weight*>(r.companion)[start + j] = left_over(param[j], rounded[j]);
    }
  }
}

template <typename Rule, Mask kMask, typename Weight, typename Moment>
__device__ void update_group(const UpdateRecord& r, const Scalars& s, int64_t start) {
  const int n = r.numel - start < kGroup ? static_cast<int>(r.numel - start) : kGroup;
  auto* const params = static_cast<Weight*>(r.param);
  auto* const exp_avgs = static_cast<Moment*>(r.exp_avg);
  auto* const exp_avg_sqs = static_cast<Moment*>(r.exp_avg_sq);
  float grad[kGroup], param[kGroup], exp_avg[kGroup], exp_avg_sq[kGroup];

  uint32_t child = 0xFu;
  if constexpr (kMask == Mask::kChild) {
    child = child_bits(r.mask_words, start);
    if (child == 0 && !r.decay_outside) return;  // no memory of the group is touched
  }
  load_group(params, start, n, r.state_aligned, param);
  add_companions<Weight>(r, start, n, param);
  if (child != 0) {
    load_group(static_cast<const Weight*>(r.grad), start, n, r.grad_aligned, grad);
    load_group(exp_avgs, start, n, r.state_aligned, exp_avg);
    if constexpr (Rule::kMoments == 2) load_group(exp_avg_sqs, start, n, r.state_aligned, exp_avg_sq);
  }

  uint32_t words[kGroup] = {};
  if constexpr (kMask == Mask::kBernoulli) {
    draw_quad(static_cast<uint64_t>(start) / 4, make_stream(r.mask_key, s.t, kGradientMask), words);
  }
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    if (kMask != Mask::kChild || child >> j & 1) {
      float g = grad[j] * s.grad_multiplier;
      if constexpr (kMask == Mask::kBernoulli) g = reserve_gradient(g, words[j], s);
      update_weight(Rule{}, g, param[j], exp_avg[j], exp_avg_sq[j], s);
    } else if (r.decay_outside) {
      param[j] = decay_weight(param[j], s);
    }
  }

  if (r.stochastic) {
    draw_quad(static_cast<uint64_t>(start) / 4, make_stream(r.rounding_key, s.t, kStochasticRounding), words);
  }
  Weight rounded[kGroup];
  round_weights(r, param, start, n, words, rounded);
  store_group(rounded, params, start, n, r.state_aligned);
  if (child != 0) {
    store_group(exp_avg, exp_avgs, start, n, r.state_aligned);
    if constexpr (Rule::kMoments == 2) store_group(exp_avg_sq, exp_avg_sqs, start, n, r.state_aligned);
  }
}

// A group of the child: moments and companions lie packed, weights and full gradients are gathered by index.
template <typename Rule, typename Weight, typename Moment>
__device__ void update_compact_group(const UpdateRecord& r, const Scalars& s, int64_t start) {
  const int n = r.numel - start < kGroup ? static_cast<int>(r.numel - start) : kGroup;
  auto* const params = static_cast<Weight*>(r.param);
  const auto* const grads = static_cast<const Weight*>(r.grad);
  auto* const exp_avgs = static_cast<Moment*>(r.exp_avg);
  auto* const exp_avg_sqs = static_cast<Moment*>(r.exp_avg_sq);
  float grad[kGroup], param[kGroup], exp_avg[kGroup], exp_avg_sq[kGroup];
  int32_t index[kGroup];
  uint32_t words[kGroup] = {};

#pragma unroll
  for (int j = 0; j < kGroup; ++j) index[j] = r.indices[start + (j < n ? j : 0)];
#pragma unroll
  for (int j = 0; j < kGroup; ++j) param[j] = static_cast<float>(params[index[j]]);
  add_companions<Weight>(r, start, n, param);
  if (r.grad_packed) {
    load_group(grads, start, n, r.grad_aligned, grad);
  } else {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) grad[j] = static_cast<float>(grads[index[j]]);
  }
  load_group(exp_avgs, start, n, r.state_aligned, exp_avg);
  if constexpr (Rule::kMoments == 2) load_group(exp_avg_sqs, start, n, r.state_aligned, exp_avg_sq);
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    float g = grad[j] * s.grad_multiplier;
    if (r.draws) g = reserve_gradient(g, draw_word(index[j], make_stream(r.mask_key, s.t, kGradientMask)), s);
    update_weight(Rule{}, g, param[j], exp_avg[j], exp_avg_sq[j], s);
    if (r.stochastic) words[j] = draw_word(index[j], make_stream(r.rounding_key, s.t, kStochasticRounding));
  }
  Weight rounded[kGroup];
  round_weights(r, param, start, n, words, rounded);
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    if (j < n) params[index[j]] = rounded[j];
  }
  store_group(exp_avg, exp_avgs, start, n, r.state_aligned);
  if constexpr (Rule::kMoments == 2) store_group(exp_avg_sq, exp_avg_sqs, start, n, r.state_aligned);
}

template <typename Rule, Mask kMask, typename Weight, typename Moment>
__global__ void __launch_bounds__(kThreads)
    update_kernel(const __grid_constant__ Table<UpdateRecord> table, const float* found_inf) {
  if (overflowed(found_inf)) return;
  const UpdateRecord& r = find_record(table);
  const Scalars s = *r.scalars;
  const int64_t tile = static_cast<int64_t>(blockIdx.x - r.first_block) * kTile;
#pragma unroll
  for (int k = 0; k < kGroupsPerThread; ++k) {
    const int64_t start = tile + (k * kThreads + threadIdx.x) * kGroup;
    if (start >= r.numel) continue;
    if constexpr (kMask != Mask::kCompact) {
      update_group<Rule, kMask, Weight, Moment>(r, s, start);
    } else if (r.indices) {
      update_compact_group<Rule, Weight, Moment>(r, s, start);
    } else if (r.draws) {
      update_group<Rule, Mask::kBernoulli, Weight, Moment>(r, s, start);
    } else {
      update_group<Rule, Mask::kNone, Weight, Moment>(r, s, start);
    }
  }
}

// Which kernel serves the lists.
Mask masking(const UpdateLists& lists) {
  if (!lists.indices.empty()) return Mask::kCompact;
  if (!lists.mask_words.empty()) return Mask::kChild;
  for (size_t i = 0; i < lists.size(); ++i) {
    if (lists.draws(i)) return Mask::kBernoulli;
  }
  return Mask::kNone;
}

template <typename Rule>
void launch_scalars(const UpdateLists& lists, Scalars* scalars, const GradientState& state, cudaStream_t stream) {
  using Records = Table<ScalarRecord>;
  const int n = static_cast<int>(lists.size());
  for (int start = 0; start < n; start += Records::kCapacity) {
    Records table;
    table.size = std::min(Records::kCapacity, n - start);
    for (int i = 0; i < table.size; ++i) {
      const size_t p = start + i;
      table.records[i] = {lists.steps[p].as<double>(), lists.lr(p), lists.row(p)};
    }
    scalars_kernel<Rule><<<blocks_for(table.size, kThreads), kThreads, 0, stream>>>(table, scalars + start, state);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

UpdateRecord make_record(const UpdateLists& lists, size_t i, Mask mask, const Scalars* scalars) {
  const Array &param = lists.params[i], &exp_avg = lists.exp_avgs[i];
  UpdateRecord r{};
  r.param = param.data;
  r.grad = lists.grads[i].data;
  r.exp_avg = exp_avg.data;
  r.scalars = scalars + i;
  r.numel = exp_avg.numel;
  r.grad_aligned = is_aligned(lists.grads[i]);  // a view of a communication buffer often is not
  r.state_aligned = is_aligned(exp_avg);
  if (lists.moments == 2) {
    r.exp_avg_sq = lists.exp_avg_sqs[i].data;
    r.state_aligned = r.state_aligned && is_aligned(lists.exp_avg_sqs[i]);
  }

  // the child
  if (mask == Mask::kChild) r.mask_words = lists.mask_words[i].as<const uint32_t>();
  r.decay_outside = lists.row(i).decay_outside != 0;
  if (lists.is_whole(i)) {
    r.state_aligned = r.state_aligned && is_aligned(param);
  } else {
    r.indices = lists.indices[i].as<const int32_t>();
  }
  r.grad_packed = lists.is_packed(i);
  r.draws = lists.draws(i);
  if (!lists.mask_keys.empty()) r.mask_key = lists.mask_keys[i];

  // how 16-bit weights are kept
  if (lists.has_companion(i)) r.companion = lists.companions[i].data;
  r.is_master = lists.is_master(i);
  r.stochastic = lists.is_stochastic(i);
  if (r.stochastic) r.rounding_key = lists.rounding_keys[i];
  return r;
}

// One launch for all tensors of a weight's and a moment's dtype.
template <typename Rule, Mask kMask>
void launch_updates(const std::vector<UpdateRecord>& records, ScalarType weight_dtype, ScalarType moment_dtype,
                    const float* found_inf, cudaStream_t stream) {
  dispatch_weights(weight_dtype, [&](auto weight) {
    dispatch_weights(moment_dtype, [&](auto moment) {
      const auto kernel = update_kernel<Rule, kMask, decltype(weight), decltype(moment)>;
      launch_tables(records, [&](const Table<UpdateRecord>& table, unsigned blocks) {
        kernel<<<blocks, kThreads, 0, stream>>>(table, found_inf);
      });
    });
  });
}

template <typename Rule>
void run(const UpdateLists& lists) {
  const int32_t device = lists.params[0].device_index;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);

  const int64_t bytes = static_cast<int64_t>(lists.size() * sizeof(Scalars));
  const Tensor workspace = torch::stable::new_empty(lists.params.tensor(0), {bytes}, ScalarType::Byte);
  auto* scalars = static_cast<Scalars*>(workspace.mutable_data_ptr());
  const GradientState state{maybe_data(lists.grad_scale), maybe_data(lists.found_inf), maybe_data(lists.grad_norm)};
  launch_scalars<Rule>(lists, scalars, state, stream);

  const Mask mask = masking(lists);
  const auto launch = mask == Mask::kCompact     ? launch_updates<Rule, Mask::kCompact>
                      : mask == Mask::kChild     ? launch_updates<Rule, Mask::kChild>
                      : mask == Mask::kBernoulli ? launch_updates<Rule, Mask::kBernoulli>
                                                 : launch_updates<Rule, Mask::kNone>;
  constexpr ScalarType kDtypes[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  for (const ScalarType weight_dtype : kDtypes) {
    for (const ScalarType moment_dtype : kDtypes) {
      std::vector<UpdateRecord> records;
      for (size_t i = 0; i < lists.size(); ++i) {
        if (lists.params[i].dtype == weight_dtype && lists.exp_avgs[i].dtype == moment_dtype)
          records.push_back(make_record(lists, i, mask, scalars));
      }
      launch(records, weight_dtype, moment_dtype, state.found_inf, stream);
    }
  }
}

constexpr void (*kRules[])(const UpdateLists&) = {run<AdamW>};  // by their kRow

}  // namespace

void update_(const UpdateLists& lists) {
  check_update(lists);
  if (lists.size() != 0) kRules[lists.rule](lists);
}

}  // namespace childtune
