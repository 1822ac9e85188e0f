// Sharing loops out over PyTorch's threads, always in the same way for the same sizes, so that results repeat bit by bit.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace kdkernels {

// Run f(begin, end) over [0, size) in one contiguous block per thread. Blocks begin at multiples of `multiple` and hold at
// least `grain` elements.
template <typename F>
void parallel_blocks(int64_t size, int64_t multiple, int64_t grain, const F& f) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t blocks = std::clamp<int64_t>(size / std::max(grain, multiple), 1, threads);
  if (blocks == 1) {
    if (size > 0) f(int64_t(0), size);
    return;
  }
  const int64_t length = (size / blocks + multiple - 1) / multiple * multiple;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * length, end = block + 1 == blocks ? size : std::min(size, begin + length);
      if (begin < end) f(begin, end);
    }
  });
}

}  // namespace kdkernels
