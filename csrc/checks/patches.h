// What patches and patches_backward expect of their arguments, and local_correlation of its maps.
#pragma once

#include "check.h"

namespace kdkernels {
namespace patches_checks {

// Check how n x c x h x w maps are cut.
struct Cut {
  int64_t images, channels, height, width, k;

  int64_t patch_height() const { return height / k + (height % k != 0); }
  int64_t patch_width() const { return width / k + (width % k != 0); }
  int64_t length() const { return channels * patch_height() * patch_width(); }
};

inline void cut(const Check& check, const Argument& argument, const Argument& side, const Cut& cut, bool resize) {
  const auto [images, channels, height, width, k] = cut;
  if (!resize && (height % k || width % k))
    check.fail(side, " must divide the height and width of ", argument, " unless resize is true, got ", side, "=", k,
               " for ", height, " x ", width);
  check.fits(argument, {images, k, k, channels, cut.patch_height(), cut.patch_width()});
  if (check.on_gpu()) check.fits_gpu(argument, "numbers in an image", cut.length() * k * k);
}

inline void maps(Check& check, const Argument& argument, const Tensor& features, const Argument& side, int64_t k,
                 bool resize) {
  check.positive(side, k);
  cut(check, argument, side, {features.size(0), features.size(1), features.size(2), features.size(3), k}, resize);
}

inline void mask(Check& check, const Argument& argument, const Tensor& mask, int64_t images, int64_t height,
                 int64_t width) {
  check.forget();
  check.bind("n", images);
  check.tensor(argument, mask, "n h w");
  check.fits(argument, {4, mask.size(1), height});
  check.fits(argument, {4, mask.size(2), width});
  check.fits_gpu(argument, "pixels", mask.size(1) * mask.size(2));
}

inline void threshold(const Check& check, std::optional<double> threshold, const char* mask, bool masked) {
  if (!threshold) return;
  check.finite("threshold", *threshold);
  if (!masked) check.fail("threshold must be None without ", mask, ", got ", *threshold);
}

// Check rows that were cut from maps. From entry `first` on, `shape` has the maps' channels, height, width, and whether
// channels are neighbours in memory.
inline Cut rows(Check& check, const Argument& argument, const Tensor& rows, const char* shape_name,
                const std::vector<int64_t>& shape, int64_t first, const Argument& side, int64_t k, bool resize) {
  check.positive(side, k);
  check.fits(side, {k, k});
  for (int64_t i = first; i < first + 3; ++i) check.positive({shape_name, i}, shape[i]);
  check.flag({shape_name, first + 3}, shape[first + 3]);
  Cut whole{1, shape[first], shape[first + 1], shape[first + 2], k};
  cut(check, argument, side, whole, resize);
  check.forget();
  check.bind("d", whole.length());
  check.tensor(argument, rows, "N d", Types::full_float);
  const int64_t count = rows.size(0);
  if (count % (k * k)) check.fail(argument, " must hold ", side, "² = ", k * k, " rows for each image, got ", count);
  whole.images = count / (k * k);
  return whole;
}

}  // namespace patches_checks

inline void check_patches(const Tensor& features, int64_t k, const std::optional<Tensor>& mask,
                          std::optional<double> threshold, bool resize, double eps) {
  Check check("patches");
  check.tensor("features", features, "n c h w");
  patches_checks::maps(check, "features", features, "k", k, resize);
  if (mask) patches_checks::mask(check, "mask", *mask, features.size(0), features.size(2), features.size(3));
  patches_checks::threshold(check, threshold, "mask", mask.has_value());
  check.non_negative("eps", eps);
}

inline void check_patches_backward(const Tensor& grad_rows, const Tensor& rows, const Tensor& norms,
                                   const std::vector<int64_t>& shape, int64_t k, const std::optional<Tensor>& mask,
                                   std::optional<double> threshold, bool resize) {
  Check check("patches_backward");
  check.holds("shape", shape, 4, "numbers");
  const patches_checks::Cut cut = patches_checks::rows(check, "rows", rows, "shape", shape, 0, "k", k, resize);
  check.tensor("grad_rows", grad_rows, "N d", Types::full_float);
  check.same_type("grad_rows", grad_rows, "rows", rows);
  check.tensor("norms", norms, "N", Types::full_float);
  check.same_type("norms", norms, "rows", rows);
  if (mask) patches_checks::mask(check, "mask", *mask, cut.images, cut.height, cut.width);
  patches_checks::threshold(check, threshold, "mask", mask.has_value());
}

}  // namespace kdkernels
