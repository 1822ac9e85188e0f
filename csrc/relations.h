// Numbers that the kernels for the CPU and for CUDA derive from an operator's arguments in the same way.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace kdkernels {

// From the weights of LKD's relations to the factors of the sums that the kernels compute, as in
// kdkernels/ops/local_correlation.
// weights: for pairs of one image, pairs of one position, and other pairs. mean: divide each sum by its number of pairs.
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

// How many terms exp(−2γ) (2γ)^p / p!, p = 1, ..., order, are not 0 in double. No kernel loops over the others.
inline int64_t nonzero_terms(double gamma, int64_t order) {
  double term = std::exp(-2 * gamma);
  int64_t count = 0;
  while (count < order && (term *= 2 * gamma / (count + 1)) != 0) ++count;
  return count;
}

}  // namespace kdkernels
