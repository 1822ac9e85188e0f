// Elements of any float type, read as numbers of the type computed in: one kernel serves every dtype of its inputs.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "device.cuh"

namespace kdkernels {

enum class Element : int { float32, float64, bfloat16, float16 };

template <typename T>
__device__ T read(const void* data, Element type, int64_t offset) {
  switch (type) {
    case Element::float64:
      return T(static_cast<const double*>(data)[offset]);
    case Element::bfloat16:
      return T(float(static_cast<const torch::headeronly::BFloat16*>(data)[offset]));
    case Element::float16:
      return T(float(static_cast<const torch::headeronly::Half*>(data)[offset]));
    default:
      return T(static_cast<const float*>(data)[offset]);
  }
}

}  // namespace kdkernels
