// What dist expects of its arguments.
#pragma once

#include "check.h"

namespace kdkernels {

inline void check_dist(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask, double beta,
                       double gamma, double temperature) {
  Check check("dist");
  check.tensor("student", student, "N K");
  check.tensor("teacher", teacher, "N K");
  if (mask) check.tensor("mask", *mask, "N", Types::mask);
  check.finite("beta", beta);
  check.finite("gamma", gamma);
  check.positive("temperature", temperature);
}

}  // namespace kdkernels
