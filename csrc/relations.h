// From the weights of LKD's relations to those of the sums that are computed, as kdkernels/ops/local_correlation has it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace kdkernels {

// weights: of the sums over pairs of one image, of one position, and of neither; mean: each is divided by its number of pairs.
template <typename Coefficients>
Coefficients coefficients_of(const std::vector<double>& weights, bool mean, int64_t images, int64_t positions) {
  double intra = weights[0], same = weights[1], diff = weights[2];
  if (mean) {
    intra /= double(images) * positions * positions;
    same /= double(positions) * images * images;
    diff /= std::max(1.0, double(images) * (images - 1) * positions * (positions - 1));
  }
  if (positions == 1) return {same, 0, 0, intra};
  if (images == 1) return {intra, 0, 0, same};
  return {diff, intra - diff, same - diff, diff};
}

}  // namespace kdkernels
