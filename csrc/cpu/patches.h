// Feature maps to unit patch vectors and back: mask, crop, resample, split and normalise, an image at a time.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "tensors.h"

namespace kdkernels {

// How the maps of one stage are cut into patches; all sizes in pixels.
struct Partition {
  int64_t images, channels, height, width;  // of the features
  int64_t k;
  int64_t patch_height, patch_width;  // after resampling to multiples of k
  bool pixel_major;                   // components of a patch vector in the order pixel, channel rather than channel, pixel
  Tensor features;
  std::optional<Tensor> mask;  // images x mask height x mask width
  std::optional<double> threshold;

  Partition(const Tensor& features, int64_t k, const std::optional<Tensor>& mask, std::optional<double> threshold,
            bool resize);

  int64_t positions() const { return k * k; }
  int64_t rows() const { return images * k * k; }
  int64_t length() const { return channels * patch_height * patch_width; }
  bool resampled() const { return patch_height * k != height || patch_width * k != width; }

  // Write rows() x length() unit vectors and the norms they were divided by; a patch of norm <= eps gives zeros and norm 0.
  template <typename T>
  void pack(T* rows, T* norms, double eps) const;

  // The gradient of the features, in their memory format and element type `dtype`, from the gradient of the rows.
  template <typename T>
  Tensor unpack(const T* grad_rows, const T* rows, const T* norms, ScalarType dtype) const;
};

}  // namespace kdkernels
