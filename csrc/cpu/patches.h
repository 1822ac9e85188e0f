// From feature maps to unit patch vectors and back: mask, crop, resample, split and normalise, one image at a time.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "tensors.h"

namespace kdkernels {

// The size of feature maps, and whether channels are neighbours in memory.
struct Shape {
  int64_t images, channels, height, width;
  bool channels_last;

  static Shape of(const Tensor& features);
  static Shape read(int64_t images, const int64_t* numbers) {
    return {images, numbers[0], numbers[1], numbers[2], numbers[3] != 0};
  }
  static constexpr int64_t kNumbers = 4;
};

// How maps of one shape are split into patches.
struct Partition : Shape {
  int64_t k;
  int64_t patch_height, patch_width;  // in pixels, after resampling to multiples of k
  bool pixel_major;                   // a patch vector is [pixel][channel], not [channel][pixel]
  std::optional<Tensor> mask;         // images x mask height x mask width
  std::optional<double> threshold;

  Partition(const Shape& shape, int64_t k, const std::optional<Tensor>& mask, std::optional<double> threshold,
            bool resize);

  int64_t positions() const { return k * k; }
  int64_t rows() const { return images * k * k; }
  int64_t length() const { return channels * patch_height * patch_width; }
  bool resampled() const { return patch_height * k != height || patch_width * k != width; }

  // Write rows() unit vectors of length(), `line` elements apart, and their norms. A patch of norm <= eps becomes zeros with
  // norm 0.
  template <typename T>
  void pack(const Tensor& features, T* rows, int64_t line, T* norms, double eps) const;

  // Compute the gradient before the normalisation from `grad`, the gradient after it: (g − x̂ ⟨g, x̂⟩) / ‖x‖. Both are compact.
  // It may work in place.
  template <typename T>
  void denormalise(const T* grad, const T* rows, int64_t line, const T* norms, T* out) const;

  // Compute `scale` times the gradient of the features from the gradient of the unnormalised patches. It is compact, in the
  // memory format of the features.
  template <typename T>
  Tensor unpack(const T* grad, T scale, const Tensor& like) const;
};

}  // namespace kdkernels
