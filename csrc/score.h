// The order of scores and how they are counted: 32-bit keys, as reference.score_keys defines them.
#pragma once

#include <cstring>

#include "philox.h"

namespace childtune {

constexpr int kMaxDigits = 11;  // bits of a key that one histogram tells apart: 2048 counts fit any shared memory

// An unsigned integer in the order of the scores; -0 and 0 are one key, and a NaN's means nothing.
CHILDTUNE_INLINE uint32_t score_key(float score) {
  const float value = score + 0.0f;  // -0 + 0 = 0
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Which entry of a histogram counts a score: digit d the keys of first + (d << shift) and the 2**shift - 1 that follow,
// entry `bins` the NaNs; a score that no entry counts gets bins + 1.
CHILDTUNE_INLINE uint32_t score_bin(float score, uint32_t first, int shift, uint32_t bins) {
  if (score != score) return bins;
  const uint32_t digit = (score_key(score) - first) >> shift;  // keys below first wrap around to large ones
  return digit < bins ? digit : bins + 1;
}

// Whether a score is in the child: beyond the threshold, or equal to it where ties are still taken.
CHILDTUNE_INLINE bool is_selected(float score, float threshold, bool takes_ties, bool lowest) {
  return (lowest ? score < threshold : score > threshold) || (takes_ties && score == threshold);
}

}  // namespace childtune
