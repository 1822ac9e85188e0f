// What dkd expects of its arguments.
#pragma once

#include "check.h"

namespace kdkernels {

inline void check_dkd(const Tensor& student, const Tensor& teacher, const Tensor& labels, double alpha, double beta,
                      double temperature, int64_t reduction) {
  Check check("dkd");
  check.tensor("student", student, "N K");
  check.tensor("teacher", teacher, "N K");
  check.tensor("labels", labels, "N", Types::labels);
  check.finite("alpha", alpha);
  check.finite("beta", beta);
  check.positive("temperature", temperature);
  if (reduction < 0 || reduction > 2) check.fail("reduction must be 0 (mean), 1 (sum) or 2 (none), got ", reduction);
}

}  // namespace kdkernels
