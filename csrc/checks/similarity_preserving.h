// What similarity_preserving expects of its arguments.
#pragma once

#include "check.h"

namespace kdkernels {

inline void check_similarity_preserving(const Tensor& student, const Tensor& teacher, double scale, bool feature) {
  Check check("similarity_preserving");
  check.tensor("student", student, "n ...");
  check.tensor("teacher", teacher, "n ...");
  const int64_t samples = student.size(0);
  if (feature)
    for (const auto& [argument, features] : {std::pair("student", &student), std::pair("teacher", &teacher)}) {
      const int64_t width = features->numel() / samples;
      check.fits(argument, {width, width});
    }
  check.finite("scale", scale);
}

}  // namespace kdkernels
