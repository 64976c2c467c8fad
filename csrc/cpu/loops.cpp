// The portable loops, and the choice between those that the compiler built and the CPU runs.
#include "loops.h"

#include <cstdlib>
#include <string>

#include "../adamw.h"
#include "../bitmask.h"
#include "../rounding.h"

namespace childtune::portable {

// One 64-bit lane, in plain C++.
struct Lanes {
  static constexpr int kCount = 1;
  uint64_t value;

  static Lanes all(uint32_t word) { return {word}; }
  static Lanes count_from(uint64_t quad) { return {quad}; }
  static void store_interleaved(uint32_t* words, Lanes c0, Lanes c1, Lanes c2, Lanes c3) {
    const uint64_t drawn[4] = {c0.value, c1.value, c2.value, c3.value};
    for (int i = 0; i < 4; ++i) words[i] = static_cast<uint32_t>(drawn[i]);
  }
};

CHILDTUNE_INLINE Lanes operator>>(Lanes a, int bits) { return {a.value >> bits}; }
CHILDTUNE_INLINE Lanes operator^(Lanes a, Lanes b) { return {a.value ^ b.value}; }
CHILDTUNE_INLINE Lanes wide_product(Lanes a, uint32_t m) { return {childtune::wide_product(a.value, m)}; }

}  // namespace childtune::portable

#define CHILDTUNE_ISA portable
#include "loops_impl.h"

namespace childtune {

const Loops& loops() {
  static const Loops& chosen = []() -> const Loops& {
#if CHILDTUNE_X86_LOOPS
    const char* limit = std::getenv("CHILDTUNE_CPU_CAPABILITY");
    const std::string highest = limit ? limit : "avx512";
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (highest == "avx512" && has_avx512) return avx512::kLoops;
    if (highest != "portable" && __builtin_cpu_supports("avx2")) return avx2::kLoops;
#endif
    return portable::kLoops;
  }();
  return chosen;
}

}  // namespace childtune
