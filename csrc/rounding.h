// How a weight of fewer bits stands for an fp32 one: the rules of childtune_kernels/ops/reference/.
#pragma once

#include <cstring>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "philox.h"

namespace childtune {

constexpr uint32_t kStochasticRounding = 1;  // the stream's domain of these random words
constexpr float kMinNormalHalf = 0x1p-14f;

CHILDTUNE_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

CHILDTUNE_INLINE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// x, of at least kCut spare bits, to a multiple of its unit without them: up with the probability of the distance.
template <int kCut>
CHILDTUNE_INLINE uint32_t cut_stochastically(float x, uint32_t word) {
  return (bits_of(x) + (word >> (32 - kCut))) >> kCut << kCut;
}

CHILDTUNE_INLINE bool is_finite(float x) { return (bits_of(x) & 0x7F800000u) != 0x7F800000u; }

CHILDTUNE_INLINE void round_stochastically(float x, uint32_t word, float& result) { result = x; }

CHILDTUNE_INLINE void round_stochastically(float x, uint32_t word, c10::BFloat16& result) {
  if (is_finite(x)) x = float_of(cut_stochastically<16>(x, word));
  result = static_cast<c10::BFloat16>(x);
}

// Below the smallest normal number the last bit has a fixed weight: there the magnitude is moved up meanwhile.
CHILDTUNE_INLINE void round_stochastically(float x, uint32_t word, c10::Half& result) {
  if (is_finite(x)) {
    const float magnitude = float_of(bits_of(x) & 0x7FFFFFFFu);
    const float shift = magnitude < kMinNormalHalf ? kMinNormalHalf : 0.0f;
    const float rounded = float_of(cut_stochastically<13>(magnitude + shift, word)) - shift;
    x = float_of(bits_of(rounded) | (bits_of(x) & 0x80000000u));
  }
  result = static_cast<c10::Half>(x);
}

// The fp32 weight that a 16-bit one and its companion stand for. Where they no longer round to it, somebody has
// replaced the weight: it counts.
template <typename T>
CHILDTUNE_INLINE float standing_weight(float exact, T weight) {
  const float w = static_cast<float>(weight);
  return static_cast<float>(static_cast<T>(exact)) == w ? exact : w;
}

template <typename T>
CHILDTUNE_INLINE float compensated(T weight, T compensation) {
  return standing_weight(static_cast<float>(weight) + static_cast<float>(compensation), weight);
}

// What rounding left over, such that the sum rounds to the weight again: rounded itself, it may reach half a unit of
// the weight, from where the sum goes to the weight's neighbour.
template <typename T>
CHILDTUNE_INLINE T left_over(float x, T rounded) {
  constexpr float kWithin = 1.0f - 0x1p-8f;
  const float near = static_cast<float>(rounded);
  const T left = static_cast<T>(x - near);
  const bool again = static_cast<float>(static_cast<T>(near + static_cast<float>(left))) == near;
  return again ? left : static_cast<T>(static_cast<float>(left) * kWithin);
}

}  // namespace childtune
