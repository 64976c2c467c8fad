// The inner loops of the CPU ops, compiled once per instruction set from loops_impl.h and chosen at run time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

// clang has no `#pragma GCC target`; it and other architectures run the portable loops.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CHILDTUNE_X86_LOOPS 1
#else
#define CHILDTUNE_X86_LOOPS 0
#endif

namespace childtune {

struct Hyper;
struct Scalars;
struct Stream;

// One parameter's arrays, from its element 0 on, and what its update needs.
struct Parameter {
  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;            // null where the rule has one moment alone
  torch::headeronly::ScalarType weight_dtype, moment_dtype;
  const Scalars* scalars;
  void* master;                // fp32, of a 16-bit weight; or null
  void* compensation;          // of the weight's dtype; or null
  const Stream* rounding;      // of 16-bit weights, stochastically; or null: to nearest
  const Stream* stream;        // of F's gradient mask; null where every gradient is kept
  const uint32_t* mask_words;  // dense D; null where the whole tensor is in the child
  bool decay_outside;          // of weights that the mask words leave out
  const int32_t* indices;      // packed D: the element of every moment; null where the whole tensor is in the child
  bool grad_packed;            // packed D: gradients lie like moments, not like weights
};

// What depends on an update's rule.
struct RuleLoops {
  Scalars (*derive)(uint32_t t, const Hyper&, const float* lr, const float* grad_scale, const float* grad_norm);
  // Works on elements first .. last - 1 of the moments; `first` is a multiple of kGrain.
  void (*update)(const Parameter&, int64_t first, int64_t last);
};

struct Loops {
  const char* name;
  const RuleLoops* rules;  // by their kRow
  // Packs the keep-bits of `numel` elements; the first is element 4 * first_quad of its parameter.
  void (*bernoulli_words)(uint32_t* words, int64_t numel, uint64_t first_quad, const Stream&, uint32_t last_kept);
};

constexpr int64_t kGrain = 64;  // threads meet at cache lines, mask words and counters, never inside one

namespace portable { extern const Loops kLoops; }
#if CHILDTUNE_X86_LOOPS
namespace avx2 { extern const Loops kLoops; }
namespace avx512 { extern const Loops kLoops; }
#endif

// The widest that this CPU runs; CHILDTUNE_CPU_CAPABILITY=portable|avx2|avx512, read once, lowers it for tests.
const Loops& loops();

}  // namespace childtune
