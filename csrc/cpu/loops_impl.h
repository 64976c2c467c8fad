// The inner loops. Included, after everything from other libraries, by one file per instruction set, which provides
// `Lanes`, a SIMD vector of 64-bit lanes for philox4x32_10, and defines CHILDTUNE_ISA, its namespace.

namespace childtune {
namespace CHILDTUNE_ISA {
namespace {

using torch::headeronly::ScalarType;

enum class Mask { kNone, kBernoulli, kChild };

constexpr int kBlock = 256;  // elements a round: its scratch, 5 KiB, stays in L1

// Two vectors of counters drawn side by side: one chain of ten dependent rounds would leave the multipliers idle
// (bernoulli_bits on one Zen 4 core, ns an element: AVX2 1.11 with one vector, 0.77 with two).
struct Pair {
  Lanes a, b;

  static Pair all(uint32_t word) { return {Lanes::all(word), Lanes::all(word)}; }
};
CHILDTUNE_INLINE Pair operator>>(Pair x, int bits) { return {x.a >> bits, x.b >> bits}; }
CHILDTUNE_INLINE Pair operator^(Pair x, Pair y) { return {x.a ^ y.a, x.b ^ y.b}; }
CHILDTUNE_INLINE Pair operator^(Pair x, uint32_t word) { return x ^ Pair::all(word); }
CHILDTUNE_INLINE Pair wide_product(Pair x, uint32_t multiplier) {
  return {wide_product(x.a, multiplier), wide_product(x.b, multiplier)};
}

constexpr int kHalfDraw = 4 * Lanes::kCount;  // words that one vector of counters gives
constexpr int kDraw = 2 * kHalfDraw;
static_assert(kBlock % kDraw == 0, "a block is whole draws");

// Writes at least n random words, whole draws, in element order.
void draw_words(uint32_t* words, int n, uint64_t first_quad, const Stream& stream) {
  for (int i = 0; i < n; i += kDraw) {
    const uint64_t quad = first_quad + i / 4;
    const Pair quads = {Lanes::count_from(quad), Lanes::count_from(quad + Lanes::kCount)};
    Pair c[4] = {quads, quads >> 32, Pair::all(stream.step), Pair::all(stream.domain)};
    philox4x32_10(c, stream.key);
    Lanes::store_interleaved(words + i, c[0].a, c[1].a, c[2].a, c[3].a);
    Lanes::store_interleaved(words + i + kHalfDraw, c[0].b, c[1].b, c[2].b, c[3].b);
  }
}

template <typename T>
float* widen(T* values, int n, float* buffer) {
#pragma omp simd
  for (int i = 0; i < n; ++i) buffer[i] = static_cast<float>(values[i]);
  return buffer;
}

template <typename T>
void narrow(const float* buffer, T* values, int n) {
#pragma omp simd
  for (int i = 0; i < n; ++i) values[i].x = static_cast<T>(buffer[i]).x;  // gcc 12 vectorises words, not structs
}

// n elements as fp32: the tensor itself where it is fp32, else `buffer`; zeros where there is none.
float* load(void* data, ScalarType dtype, int64_t start, int n, float* buffer) {
  if (!data) {
    for (int i = 0; i < n; ++i) buffer[i] = 0.0f;
    return buffer;
  }
  if (dtype == ScalarType::Float) return static_cast<float*>(data) + start;
  if (dtype == ScalarType::BFloat16) return widen(static_cast<c10::BFloat16*>(data) + start, n, buffer);
  return widen(static_cast<c10::Half*>(data) + start, n, buffer);
}

// The counterpart of load: fp32 tensors were updated in place.
void store(const float* buffer, void* data, ScalarType dtype, int64_t start, int n) {
  if (!data) return;
  if (dtype == ScalarType::BFloat16) narrow(buffer, static_cast<c10::BFloat16*>(data) + start, n);
  if (dtype == ScalarType::Half) narrow(buffer, static_cast<c10::Half*>(data) + start, n);
}

// Turns n 16-bit weights into those that they and their companions, from `start` on, stand for.
template <typename T>
C10_ALWAYS_INLINE float* complete(const Parameter& p, const T* weights, int64_t start, int n, float* buffer) {
  if (p.master) {
    float* master = static_cast<float*>(p.master) + start;
#pragma omp simd
    for (int i = 0; i < n; ++i) master[i] = standing_weight(master[i], weights[i]);
    return master;
  }
  const T* lacking = static_cast<const T*>(p.compensation) + start;
#pragma omp simd
  for (int i = 0; i < n; ++i) buffer[i] = compensated(weights[i], lacking[i]);
  return buffer;
}

// n weights as fp32, wherever their bits are.
C10_ALWAYS_INLINE float* load_weights(const Parameter& p, int64_t start, int n, float* buffer) {
  if (!p.master && !p.compensation) return load(p.param, p.weight_dtype, start, n, buffer);
  if (p.weight_dtype == ScalarType::BFloat16)
    return complete(p, static_cast<const c10::BFloat16*>(p.param) + start, start, n, buffer);
  return complete(p, static_cast<const c10::Half*>(p.param) + start, start, n, buffer);
}

// Rounds n fp32 weights to 16 bit; `start` is where their companions are. words: null, or 32 random bits a weight.
template <typename T>
C10_ALWAYS_INLINE void round_weights(
    const Parameter& p, const float* param, int64_t start, int n, const uint32_t* words, T* rounded) {
  if (words) {
    for (int i = 0; i < n; ++i) round_stochastically(param[i], words[i], rounded[i]);
  } else {
    narrow(param, rounded, n);
  }
  if (p.compensation) {
    T* lacking = static_cast<T*>(p.compensation) + start;
    for (int i = 0; i < n; ++i) lacking[i] = left_over(param[i], rounded[i]);
  }
}

// The counterpart of load_weights; fp32 weights were updated in place.
C10_ALWAYS_INLINE void store_weights(const Parameter& p, const float* param, int64_t start, int n) {
  alignas(64) uint32_t drawn[kBlock];
  const uint32_t* words = p.rounding ? drawn : nullptr;
  if (words) draw_words(drawn, n, static_cast<uint64_t>(start) / 4, *p.rounding);
  if (p.weight_dtype == ScalarType::BFloat16)
    round_weights(p, param, start, n, words, static_cast<c10::BFloat16*>(p.param) + start);
  if (p.weight_dtype == ScalarType::Half)
    round_weights(p, param, start, n, words, static_cast<c10::Half*>(p.param) + start);
}

// Inlined, so that every full block has a constant n and its loops unroll.
template <typename Rule, Mask kMask>
C10_ALWAYS_INLINE void update_block(const Parameter& p, const Scalars& s, int64_t start, int n) {
  alignas(64) float buffers[4][kBlock];
  alignas(64) uint32_t words[kBlock];
  const float* grad = load(const_cast<void*>(p.grad), p.weight_dtype, start, n, buffers[0]);
  float* param = load_weights(p, start, n, buffers[1]);
  float* exp_avg = load(p.exp_avg, p.moment_dtype, start, n, buffers[2]);
  float* exp_avg_sq = load(p.exp_avg_sq, p.moment_dtype, start, n, buffers[3]);
  if constexpr (kMask == Mask::kBernoulli) draw_words(words, n, static_cast<uint64_t>(start) / 4, *p.stream);
  const uint32_t child = kMask == Mask::kChild ? p.mask_words[start / kWordBits] : 0;
  const bool decay_outside = p.decay_outside;

#pragma omp simd
  for (int i = 0; i < n; ++i) {
    float g = grad[i] * s.grad_multiplier;
    if constexpr (kMask == Mask::kBernoulli) g = reserve_gradient(g, words[i], s);
    float w = param[i], m = exp_avg[i], v = exp_avg_sq[i];
    update_weight(Rule{}, g, w, m, v, s);
    if constexpr (kMask == Mask::kChild) {
      const bool keep = child >> i & 1;
      const float outside = decay_outside ? decay_weight(param[i], s) : param[i];
      w = keep ? w : outside;
      m = keep ? m : exp_avg[i];
      v = keep ? v : exp_avg_sq[i];
    }
    param[i] = w;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
  }

  store_weights(p, param, start, n);
  store(exp_avg, p.exp_avg, p.moment_dtype, start, n);
  store(exp_avg_sq, p.exp_avg_sq, p.moment_dtype, start, n);
}

template <typename Rule, Mask kMask>
void update_dense(const Parameter& p, int64_t first, int64_t last) {
  const Scalars s = *p.scalars;
  int64_t start = first;
  for (; start + kBlock <= last; start += kBlock) update_block<Rule, kMask>(p, s, start, kBlock);
  if (start < last) update_block<Rule, kMask>(p, s, start, static_cast<int>(last - start));
}

// Word by word, so that words without a child cost no memory traffic. Testing cache lines of 16 weights one by one
// costs more than it saves: a random tenth took 1.3 of plain AdamW's time (fp32, one Zen 4 core), words take 1.04.
template <typename Rule>
void update_child(const Parameter& p, int64_t first, int64_t last) {
  const Scalars s = *p.scalars;
  for (int64_t start = first; start < last; start += kWordBits) {
    if (p.mask_words[start / kWordBits] == 0 && !p.decay_outside) continue;
    if (start + kWordBits <= last) {
      update_block<Rule, Mask::kChild>(p, s, start, kWordBits);
    } else {
      update_block<Rule, Mask::kChild>(p, s, start, static_cast<int>(last - start));
    }
  }
}

template <typename T>
void gather(const T* values, const int32_t* indices, int n, float* buffer) {
  for (int i = 0; i < n; ++i) buffer[i] = static_cast<float>(values[indices[i]]);
}

void gather(const void* data, ScalarType dtype, const int32_t* indices, int n, float* buffer) {
  if (dtype == ScalarType::Float) return gather(static_cast<const float*>(data), indices, n, buffer);
  if (dtype == ScalarType::BFloat16) return gather(static_cast<const c10::BFloat16*>(data), indices, n, buffer);
  gather(static_cast<const c10::Half*>(data), indices, n, buffer);
}

// Rounds n weights of the child, and puts each where it belongs.
template <typename T>
void scatter(const Parameter& p, const float* param, int64_t start, int n) {
  alignas(64) T rounded[kBlock];
  alignas(64) uint32_t words[kBlock];
  const int32_t* indices = p.indices + start;
  if (p.rounding) {
    for (int i = 0; i < n; ++i) words[i] = draw_word(indices[i], *p.rounding);
  }
  round_weights(p, param, start, n, p.rounding ? words : nullptr, rounded);
  for (int i = 0; i < n; ++i) static_cast<T*>(p.param)[indices[i]] = rounded[i];
}

template <typename T>
float* gather_completed(const Parameter& p, int64_t start, int n, float* buffer) {
  alignas(64) T weights[kBlock];
  for (int i = 0; i < n; ++i) weights[i] = static_cast<const T*>(p.param)[p.indices[start + i]];
  return complete(p, weights, start, n, buffer);
}

float* gather_weights(const Parameter& p, int64_t start, int n, float* buffer) {
  if (p.master || p.compensation) {
    if (p.weight_dtype == ScalarType::BFloat16) return gather_completed<c10::BFloat16>(p, start, n, buffer);
    return gather_completed<c10::Half>(p, start, n, buffer);
  }
  gather(p.param, p.weight_dtype, p.indices + start, n, buffer);
  return buffer;
}

void scatter_weights(const Parameter& p, const float* param, int64_t start, int n) {
  if (p.weight_dtype == ScalarType::BFloat16) return scatter<c10::BFloat16>(p, param, start, n);
  if (p.weight_dtype == ScalarType::Half) return scatter<c10::Half>(p, param, start, n);
  for (int i = 0; i < n; ++i) static_cast<float*>(p.param)[p.indices[start + i]] = param[i];
}

// A block of the child: moments and companions lie packed, weights and full gradients are gathered by index.
template <typename Rule>
void update_compact_block(const Parameter& p, const Scalars& s, int64_t start, int n) {
  alignas(64) float buffers[4][kBlock];
  const int32_t* indices = p.indices + start;
  const float* stored = buffers[0];
  if (p.grad_packed) {
    stored = load(const_cast<void*>(p.grad), p.weight_dtype, start, n, buffers[0]);
  } else {
    gather(p.grad, p.weight_dtype, indices, n, buffers[0]);
  }
  alignas(64) float grad[kBlock];
  for (int i = 0; i < n; ++i) grad[i] = stored[i] * s.grad_multiplier;
  if (p.stream) {
    for (int i = 0; i < n; ++i) grad[i] = reserve_gradient(grad[i], draw_word(indices[i], *p.stream), s);
  }
  float* param = gather_weights(p, start, n, buffers[1]);
  float* exp_avg = load(p.exp_avg, p.moment_dtype, start, n, buffers[2]);
  float* exp_avg_sq = load(p.exp_avg_sq, p.moment_dtype, start, n, buffers[3]);
#pragma omp simd
  for (int i = 0; i < n; ++i) update_weight(Rule{}, grad[i], param[i], exp_avg[i], exp_avg_sq[i], s);
  scatter_weights(p, param, start, n);
  store(exp_avg, p.exp_avg, p.moment_dtype, start, n);
  store(exp_avg_sq, p.exp_avg_sq, p.moment_dtype, start, n);
}

template <typename Rule>
void update_compact(const Parameter& p, int64_t first, int64_t last) {
  const Scalars s = *p.scalars;
  for (int64_t start = first; start < last; start += kBlock)
    update_compact_block<Rule>(p, s, start, static_cast<int>(std::min<int64_t>(kBlock, last - start)));
}

// What a parameter has says which of its elements are updated.
template <typename Rule>
void update(const Parameter& p, int64_t first, int64_t last) {
  if (p.indices) return update_compact<Rule>(p, first, last);
  if (p.mask_words) return update_child<Rule>(p, first, last);
  if (p.stream) return update_dense<Rule, Mask::kBernoulli>(p, first, last);
  update_dense<Rule, Mask::kNone>(p, first, last);
}

void bernoulli_words(uint32_t* out, int64_t numel, uint64_t first_quad, const Stream& stream, uint32_t last_kept) {
  alignas(64) uint32_t words[kBlock];
  for (int64_t start = 0; start < numel; start += kWordBits) {
    const int64_t drawn = start % kBlock;
    if (drawn == 0) draw_words(words, kBlock, first_quad + start / 4, stream);
    uint32_t bits = 0;
#pragma omp simd reduction(| : bits)
    for (int i = 0; i < kWordBits; ++i) bits |= static_cast<uint32_t>(words[drawn + i] <= last_kept) << i;
    out[start / kWordBits] = bits & valid_bits(numel - start);
  }
}

const RuleLoops kRules[] = {
    {derive_scalars<AdamW>, update<AdamW>},
};

}  // namespace

const Loops kLoops = {C10_STRINGIZE(CHILDTUNE_ISA), kRules, bernoulli_words};

}  // namespace CHILDTUNE_ISA
}  // namespace childtune
