// Launches the kernels of patches. One launch serves the maps of one network or of all stages.
#pragma once

#include <optional>

#include "host.h"
#include "patches.cuh"

namespace kdkernels {

// The size of feature maps, and whether channels are neighbours in memory.
struct Shape {
  int64_t images, channels, height, width;
  bool channels_last;

  static Shape of(const Tensor& features) {
    const int64_t c = features.size(1), h = features.size(2), w = features.size(3);
    return {features.size(0), c, h, w, features.stride(1) == 1 && c > 1 && h * w > 1};
  }
  static Shape read(int64_t images, const int64_t* numbers) {
    return {images, numbers[0], numbers[1], numbers[2], numbers[3] != 0};
  }
  static constexpr int64_t kNumbers = 4;
};

// The mask, if there is one, and the crop before the patches are cut.
struct Mask {
  std::optional<Tensor> weights;  // images x mask height x mask width
  std::optional<double> threshold;
};

// Patches of one or more networks. Problems are collected first. Then each step is one launch for all problems. Rows
// have numbers E. They may be half precision if half-precision maps are cut without a mask, a crop or a resize.
template <typename T, typename E = T>
class Patching {
 public:
  explicit Patching(const OnDevice& device) : device_(device) {}

  // Return how maps of this shape are cut. This object owns the memory for it.
  Cut<T> cut(const Shape& shape, int64_t k, const Mask& mask, bool resize, const Tensor& like);

  void pack(const Cut<T>& cut, const Tensor& features, E* rows, T* norms, T* factors, double eps);
  void denormalise(const Cut<T>& cut, int64_t images, const T* grad, const T* rows, const T* norms, T* out);
  // Compute `scale` times the gradient to the features, compact in their memory format. The scale is a scalar tensor.
  Tensor unpack(const Cut<T>& cut, const Shape& shape, const T* grad, const Tensor* scale, const Tensor& like);

  // Launch all collected problems.
  void run();

 private:
  const OnDevice& device_;
  std::vector<Tensor> memory_;
  Problems<Masking<T>> masks_;
  Problems<Packing<T, E>> packings_;
  Problems<Projection<T>> projections_;
  Problems<Unpacking<T>> unpackings_;
};

}  // namespace kdkernels
