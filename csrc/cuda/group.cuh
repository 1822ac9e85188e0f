// Several problems of one kind in one launch. At small sizes, the number of launches determines the cost of a
// loss.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "device.cuh"

namespace kdkernels {

// The blocks of problem i are first[i] to first[i + 1]. The struct is a kernel parameter, and parameters hold 4 KiB.
template <typename P>
struct Group {
  static constexpr int kMost = 3584 / sizeof(P) < 16 ? 3584 / sizeof(P) : 16;

  int count = 0;
  int64_t first[kMost + 1] = {};
  P problems[kMost] = {};

  void add(const P& problem, int64_t blocks) {
    problems[count++] = problem;
    first[count] = first[count - 1] + blocks;
  }
  int64_t blocks() const { return first[count]; }

  // The problem of the calling block, and the block's index within this problem.
  __device__ int index() const {
    int i = 0;
    while (i + 1 < count && int64_t(blockIdx.x) >= first[i + 1]) ++i;
    return i;
  }
  __device__ int block(int i) const { return int(blockIdx.x - first[i]); }
};

// Each problem with its number of blocks.
template <typename P>
using Problems = std::vector<std::pair<P, int64_t>>;

// As few launches as the parameters allow: one, unless a network has very many stages.
template <typename P, typename... Arguments>
void launch(void (*kernel)(Group<P>, Arguments...), const Problems<P>& problems, int threads, int shared_bytes,
            Stream stream, const Arguments&... arguments) {
  for (size_t begin = 0; begin < problems.size(); begin += Group<P>::kMost) {
    Group<P> group;
    for (size_t i = begin; i < std::min(problems.size(), begin + Group<P>::kMost); ++i)
      group.add(problems[i].first, problems[i].second);
    launch(kernel, group.blocks(), threads, shared_bytes, stream, group, arguments...);
  }
}

}  // namespace kdkernels
