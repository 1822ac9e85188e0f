// What the kernels of divergence share on both devices.
#pragma once

#include "checks/divergence.h"
#include "cpu/tensors.h"

namespace kdkernels {

enum Kind : int64_t { forward, reverse, jsd };

// The numbers that are saved for each row. Those from top_q on are the moments. The GPU has one mode, 0.
enum Saved : int64_t {
  max_p,
  max_q,
  sum_p,
  sum_q,
  mode,
  top_q,
  mean_p,
  mean_q,
  moment_p,
  moment_q,
  centre_p,
  centre_q,
  deviation_p,
  deviation_q,
  count_p,
  count_q,
  numbers,
};
static_assert(top_q == kSavedNumbers && numbers == kSavedMoments);

constexpr double kStandardEps = 1e-7;  // added to the standard deviation by logit standardisation

// A compact gradient, with the classes inside or outside as in the logits.
inline Tensor new_gradient(const Tensor& x, bool wanted) {
  if (!wanted) return new_compact(x, {0});
  const int64_t outer = x.size(0), inner = x.size(1), classes = x.size(2);
  if (x.stride(2) == 1 || inner == 1) return new_compact(x, {outer, inner, classes});
  return torch::stable::transpose(new_compact(x, {outer, classes, inner}), 1, 2);
}

}  // namespace kdkernels
