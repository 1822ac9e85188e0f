// Loops over PyTorch's threads. Equal sizes are always divided in the same way, so results repeat bit by bit.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace kdkernels {

// [0, size) in one contiguous block per thread. Blocks begin at multiples of `multiple` and have at least `grain` elements.
struct Blocks {
  int64_t size, count, length;

  Blocks(int64_t size, int64_t multiple, int64_t grain) : size(size) {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t wanted = std::clamp<int64_t>(size / std::max(grain, multiple), 1, threads);
    length = std::max<int64_t>(1, ((size + wanted - 1) / wanted + multiple - 1) / multiple * multiple);
    count = (size + length - 1) / length;
  }

  // Run f(block, begin, end) on every block.
  template <typename F>
  void parallel(const F& f) const {
    if (count == 1) return f(int64_t(0), int64_t(0), size);
    torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) f(block, block * length, std::min(size, (block + 1) * length));
    });
  }
};

// Run f(begin, end) over [0, size) in such blocks.
template <typename F>
void parallel_blocks(int64_t size, int64_t multiple, int64_t grain, const F& f) {
  Blocks(size, multiple, grain).parallel([&](int64_t, int64_t begin, int64_t end) { f(begin, end); });
}

}  // namespace kdkernels
