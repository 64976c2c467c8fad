// The loops for AVX-512. What other libraries' headers define is compiled above the pragma, for any x86-64.
#include "loops.h"

#if CHILDTUNE_X86_LOOPS
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12 warns of its own immintrin.h
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")

#include "../adamw.h"
#include "../bitmask.h"
#include "../rounding.h"

namespace childtune::avx512 {

struct Lanes {
  static constexpr int kCount = 8;
  __m512i value;

  static Lanes all(uint32_t word) { return {_mm512_set1_epi64(word)}; }
  static Lanes count_from(uint64_t quad) {
    return {_mm512_add_epi64(_mm512_set1_epi64(quad), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7))};
  }
  static void store_interleaved(uint32_t* words, Lanes c0, Lanes c1, Lanes c2, Lanes c3) {
    const __m512i low = _mm512_mask_blend_epi32(0xAAAA, c0.value, _mm512_slli_epi64(c1.value, 32));
    const __m512i high = _mm512_mask_blend_epi32(0xAAAA, c2.value, _mm512_slli_epi64(c3.value, 32));
    const __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
    const __m512i second = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    _mm512_storeu_si512(words, _mm512_permutex2var_epi64(low, first, high));
    _mm512_storeu_si512(words + 16, _mm512_permutex2var_epi64(low, second, high));
  }
};

CHILDTUNE_INLINE Lanes operator>>(Lanes a, int bits) { return {_mm512_srli_epi64(a.value, bits)}; }
CHILDTUNE_INLINE Lanes operator^(Lanes a, Lanes b) { return {_mm512_xor_si512(a.value, b.value)}; }
CHILDTUNE_INLINE Lanes wide_product(Lanes a, uint32_t m) { return {_mm512_mul_epu32(a.value, _mm512_set1_epi64(m))}; }

}  // namespace childtune::avx512

#define CHILDTUNE_ISA avx512
#include "loops_impl.h"
#pragma GCC pop_options
#endif
