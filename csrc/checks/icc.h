// What icc_map, icc_map_backward and icc_loss expect of their arguments.
#pragma once

#include "check.h"

namespace kdkernels {
namespace icc_checks {

inline void logits(Check& check, const Argument& argument, const Tensor& logits) {
  check.tensor(argument, logits, "b K");
  const int64_t classes = logits.size(1);
  check.fits(argument, {classes, classes});
  check.fits_gpu(argument, "samples", logits.size(0));
  check.fits_gpu(argument, "classes", classes);
}

}  // namespace icc_checks

inline void check_icc_map(const Tensor& logits) {
  Check check("icc_map");
  icc_checks::logits(check, "logits", logits);
}

inline void check_icc_map_backward(const Tensor& grad_map, const Tensor& logits) {
  Check check("icc_map_backward");
  icc_checks::logits(check, "logits", logits);
  check.tensor("grad_map", grad_map, "K K");
  check.compute_type("grad_map", grad_map, "logits", logits);
}

inline void check_icc_loss(const Tensor& student, const Tensor& teacher, double scale) {
  Check check("icc_loss");
  icc_checks::logits(check, "student", student);
  check.tensor("teacher", teacher, "b K");
  check.finite("scale", scale);
}

}  // namespace kdkernels
