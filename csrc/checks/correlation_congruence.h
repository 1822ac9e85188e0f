// What correlation_congruence expects of its arguments.
#pragma once

#include "check.h"

namespace kdkernels {

inline void check_correlation_congruence(const Tensor& student, const Tensor& teacher, int64_t kernel, double gamma,
                                         int64_t order, double scale, const std::vector<int64_t>& plan,
                                         bool grad_teacher) {
  constexpr int64_t bilinear = 2;
  Check check("correlation_congruence");
  check.tensor("student", student, "n d_S");
  check.tensor("teacher", teacher, "n d_T");
  const int64_t rows = student.size(0), width_x = student.size(1), width_y = teacher.size(1);
  check.fits("student", {rows, rows});
  check.fits("student", {width_x, width_x});
  check.fits("teacher", {width_y, width_y});
  check.fits_gpu("student", "rows", rows);
  check.fits_gpu("student", "columns", width_x);
  check.fits_gpu("teacher", "columns", width_y);
  if (kernel < 0 || kernel > 3)
    check.fail("kernel must be 0 (taylor_rbf), 1 (rbf), 2 (bilinear) or 3 (mmd), got ", kernel);
  check.positive("gamma", gamma);
  check.non_negative("order", order);
  check.finite("scale", scale);
  check.holds("plan", plan, 3, "form codes");
  check.plan("plan", plan, 0, grad_teacher);
  if (kernel != bilinear && plan[0] != 0)
    check.fail("plan[0] must be 0 (gram) for every kernel but the bilinear one, got ", plan[0]);
}

}  // namespace kdkernels
