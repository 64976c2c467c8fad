// Packed masks: bit i of 32-bit word w is element 32 * w + i in row-major order; spare bits of the last word are 0.
#pragma once

#include "philox.h"

namespace childtune {

constexpr int kWordBits = 32;

CHILDTUNE_INLINE int64_t words_for(int64_t numel) { return (numel + kWordBits - 1) / kWordBits; }

// The bits of a word that stand for elements, of which `remaining` are left from its bit 0 on.
CHILDTUNE_INLINE uint32_t valid_bits(int64_t remaining) {
  return remaining >= kWordBits ? ~0u : (1u << remaining) - 1;
}

// Set bits of a word, summed in pairs, nibbles and bytes: vectorises on any CPU, and compilers know it as popcount.
CHILDTUNE_INLINE uint32_t count_bits(uint32_t word) {
  word -= word >> 1 & 0x55555555u;
  word = (word & 0x33333333u) + (word >> 2 & 0x33333333u);
  return ((word + (word >> 4)) & 0x0F0F0F0Fu) * 0x01010101u >> 24;
}

}  // namespace childtune
