// Shared by the divergences of two networks' logits.
#pragma once

#include "elements.cuh"

namespace kdkernels {

// Rows of logits in any strides.
struct Logits {
  const void* data;
  Element type;
  int64_t row_stride, stride;
};

// exp(-d) - 1 + d for |d| <= 1/2 from its Taylor series, in which nothing cancels.
template <typename T>
__device__ T exp_remainder(T d) {
  constexpr int degree = sizeof(T) == sizeof(double) ? 15 : 9;
  T series = T(1);  // Horner: 1/2 d² (1 - d/3 (1 - d/4 (...)))
#pragma unroll
  for (int i = degree; i >= 3; --i) series = T(1) - d * series * (T(1) / T(i));
  return T(0.5) * d * d * series;
}

}  // namespace kdkernels
