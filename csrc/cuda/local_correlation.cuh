// The end of the LKD loss: the sum of its parts, and the gradients to the patches before the normalisation.
#pragma once

#include "patches.cuh"

namespace kdkernels {

constexpr int kMostStages = 8;  // stages in one launch

// A patch with norm <= eps in exactly one network has D_rr = ±1. All other diagonal entries of D are 0.
template <typename T>
struct DeadRows {
  const T *norms_x, *norms_y;
  int64_t rows;
  double coefficient;
};

template <typename T>
struct Loss {
  const double* parts;
  int64_t count;
  int stages;
  DeadRows<T> dead[kMostStages];
  void* result;
  bool in_double, accumulate;
};

// One block adds in a fixed order.
template <typename T>
__device__ void add_up(const Loss<T>& loss) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < loss.count; i += blockDim.x) sum += loss.parts[i];
  for (int stage = 0; stage < loss.stages; ++stage) {
    const DeadRows<T>& dead = loss.dead[stage];
    for (int64_t r = threadIdx.x; r < dead.rows; r += blockDim.x)
      if ((dead.norms_x[r] == 0) != (dead.norms_y[r] == 0)) sum += dead.coefficient;
  }
  sum = block_reduce(sum, Sum<double>());
  if (threadIdx.x > 0) return;
  if (loss.in_double) {
    double& result = *static_cast<double*>(loss.result);
    result = loss.accumulate ? result + sum : sum;
  } else {
    float& result = *static_cast<float*>(loss.result);
    result = float(loss.accumulate ? result + sum : sum);
  }
}

// One block per row of the gradients, and one more for the loss.
template <typename T, typename E>
__global__ void __launch_bounds__(512, 1)
    finish_kernel(const __grid_constant__ Group<Projection<T, E>> group, const __grid_constant__ Loss<T> loss) {
  if (blockIdx.x == gridDim.x - 1) {
    add_up(loss);
  } else {
    const int index = group.index();
    denormalise(group.problems[index], group.block(index));
  }
}

}  // namespace kdkernels
