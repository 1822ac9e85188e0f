// What kd expects of its arguments.
#pragma once

#include "check.h"

namespace kdkernels {

inline void check_kd(const Tensor& student, const Tensor& teacher, double temperature, double scale) {
  Check check("kd");
  check.tensor("student", student, "b K");
  check.tensor("teacher", teacher, "b K");
  check.positive("temperature", temperature);
  check.finite("scale", scale);
}

}  // namespace kdkernels
