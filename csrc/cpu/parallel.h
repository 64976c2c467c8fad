// One parallel loop over all elements of a list of tensors.
#pragma once

#include <vector>

#include <torch/csrc/stable/ops.h>

#include "loops.h"

namespace childtune {

constexpr int64_t kMinGrains = 512;  // 32 Ki elements, about 20 us of work: less is not worth a thread

// Calls run(i, first, last) so that every element of every tensor i is covered once. Threads get equal shares of the
// whole list, cut at multiples of kGrain elements, however small or large its tensors are.
template <typename Run>
void parallel_elements(const std::vector<int64_t>& numels, const Run& run) {
  std::vector<int64_t> ends;  // grains up to and including each tensor
  int64_t total = 0;
  for (const int64_t numel : numels) ends.push_back(total += (numel + kGrain - 1) / kGrain);
  torch::stable::parallel_for(0, total, kMinGrains, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
    for (; begin < end; ++i) {
      const int64_t start = i == 0 ? 0 : ends[i - 1], stop = std::min(end, ends[i]);
      if (begin < stop) run(i, (begin - start) * kGrain, std::min((stop - start) * kGrain, numels[i]));
      begin = stop;
    }
  });
}

}  // namespace childtune
