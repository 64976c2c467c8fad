// The loops for AVX2. What other libraries' headers define is compiled above the pragma, for any x86-64.
#include "loops.h"

#if CHILDTUNE_X86_LOOPS
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx2")

#include "../adamw.h"
#include "../bitmask.h"
#include "../rounding.h"

namespace childtune::avx2 {

struct Lanes {
  static constexpr int kCount = 4;
  __m256i value;

  static Lanes all(uint32_t word) { return {_mm256_set1_epi64x(word)}; }
  static Lanes count_from(uint64_t quad) {
    return {_mm256_add_epi64(_mm256_set1_epi64x(quad), _mm256_setr_epi64x(0, 1, 2, 3))};
  }
  static void store_interleaved(uint32_t* words, Lanes c0, Lanes c1, Lanes c2, Lanes c3) {
    const __m256i low = _mm256_blend_epi32(c0.value, _mm256_slli_epi64(c1.value, 32), 0xAA);
    const __m256i high = _mm256_blend_epi32(c2.value, _mm256_slli_epi64(c3.value, 32), 0xAA);
    const __m256i even = _mm256_unpacklo_epi64(low, high), odd = _mm256_unpackhi_epi64(low, high);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + 8), _mm256_permute2x128_si256(even, odd, 0x31));
  }
};

CHILDTUNE_INLINE Lanes operator>>(Lanes a, int bits) { return {_mm256_srli_epi64(a.value, bits)}; }
CHILDTUNE_INLINE Lanes operator^(Lanes a, Lanes b) { return {_mm256_xor_si256(a.value, b.value)}; }
CHILDTUNE_INLINE Lanes wide_product(Lanes a, uint32_t m) { return {_mm256_mul_epu32(a.value, _mm256_set1_epi64x(m))}; }

}  // namespace childtune::avx2

#define CHILDTUNE_ISA avx2
#include "loops_impl.h"
#pragma GCC pop_options
#endif
