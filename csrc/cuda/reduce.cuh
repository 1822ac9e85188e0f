// The end of every loss. It adds the float64 parts of the earlier kernels' blocks in a fixed order.
#pragma once

#include "device.cuh"
#include "tuning.cuh"

namespace kdkernels {

template <typename T>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_kernel(const double* parts, int64_t count, double scale, T* result) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kReduceThreads) sum += parts[i];
  sum = block_reduce(sum, Sum<double>());
  if (threadIdx.x == 0) *result = T(scale * sum);
}

}  // namespace kdkernels
