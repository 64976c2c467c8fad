// The mask stream, version 1, as specified in childtune_kernels/philox.py: a keep-bit depends on (key, step, domain,
// element index) and on nothing else. Philox is the counter-based generator of Salmon et al., "Parallel random numbers:
// as easy as 1, 2, 3" (SC 2011).
#pragma once

#include <cstdint>

#include <torch/headeronly/macros/Macros.h>

// Internal linkage: the CPU loops compile these rules once per instruction set, and a copy shared between translation
// units would let the linker hand AVX-512 code to a machine without it.
#define CHILDTUNE_INLINE C10_HOST_DEVICE static inline

namespace childtune {

constexpr uint32_t kGradientMask = 0;  // the stream's domain of F's gradient mask
constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxMultipliers[2] = {0xD2511F53, 0xCD9E8D57};
constexpr uint32_t kPhiloxKeySteps[2] = {0x9E3779B9, 0xBB67AE85};

// What is fixed for all elements of one parameter at one step.
struct Stream {
  uint32_t key[2];
  uint32_t step;
  uint32_t domain;
};

CHILDTUNE_INLINE Stream make_stream(int64_t key, uint32_t step, uint32_t domain) {
  return {{static_cast<uint32_t>(key), static_cast<uint32_t>(static_cast<uint64_t>(key) >> 32)}, step, domain};
}

// The largest kept word: keep <=> word < floor(p * 2^32). Inclusive, so that p = 1 fits 32 bits.
CHILDTUNE_INLINE uint32_t last_kept_word(double p) {
  return static_cast<uint32_t>(static_cast<uint64_t>(p * 4294967296.0) - 1);
}

CHILDTUNE_INLINE uint64_t wide_product(uint64_t word, uint32_t multiplier) {
  return static_cast<uint64_t>(static_cast<uint32_t>(word)) * multiplier;
}

// Turns counters, in place, into random words. `Word` is uint64_t or a SIMD vector of such lanes. Only the low 32 bits
// of a lane count, before and after: widening multiplies ignore the rest, so no round has to clear it.
template <typename Word>
CHILDTUNE_INLINE void philox4x32_10(Word (&c)[4], const uint32_t (&key)[2]) {
  for (uint32_t round = 0; round < kPhiloxRounds; ++round) {
    const uint32_t key0 = key[0] + round * kPhiloxKeySteps[0];
    const uint32_t key1 = key[1] + round * kPhiloxKeySteps[1];
    const Word product0 = wide_product(c[0], kPhiloxMultipliers[0]);
    const Word product1 = wide_product(c[2], kPhiloxMultipliers[1]);
    c[0] = (product1 >> 32) ^ c[1] ^ key0;
    c[1] = product1;
    c[2] = (product0 >> 32) ^ c[3] ^ key1;
    c[3] = product0;
  }
}

// The words of elements 4 * quad .. 4 * quad + 3.
CHILDTUNE_INLINE void draw_quad(uint64_t quad, const Stream& stream, uint32_t (&words)[4]) {
  uint64_t c[4] = {quad, quad >> 32, stream.step, stream.domain};
  philox4x32_10(c, stream.key);
  for (int i = 0; i < 4; ++i) words[i] = static_cast<uint32_t>(c[i]);
}

// The word of one element; chosen without an index into registers.
CHILDTUNE_INLINE uint32_t draw_word(int64_t element, const Stream& stream) {
  uint32_t words[4];
  draw_quad(static_cast<uint64_t>(element) / 4, stream, words);
  const uint32_t low = element & 1 ? words[1] : words[0], high = element & 1 ? words[3] : words[2];
  return element & 2 ? high : low;
}

}  // namespace childtune
