// What rkd expects of its arguments.
#pragma once

#include "check.h"

namespace kdkernels {

inline void check_rkd(const Tensor& student, const Tensor& teacher, double distance_weight, double angle_weight) {
  Check check("rkd");
  check.tensor("student", student, "b d_S");
  check.tensor("teacher", teacher, "b d_T");
  check.fits("student", {student.size(0), student.size(0)});
  check.non_negative("distance_weight", distance_weight);
  check.non_negative("angle_weight", angle_weight);
}

}  // namespace kdkernels
