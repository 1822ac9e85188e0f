// What congruence expects of its arguments.
#pragma once

#include "check.h"

namespace kdkernels {

inline void check_congruence(const Tensor& x, const Tensor& y, int64_t positions,
                             const std::vector<double>& coefficients, const std::vector<int64_t>& plan, bool grad_y) {
  Check check("congruence");
  check.tensor("x", x, "N d_S", Types::full_float);
  check.tensor("y", y, "N d_T", Types::full_float);
  check.same_type("y", y, "x", x);
  const int64_t rows = x.size(0), width_x = x.size(1), width_y = y.size(1);
  check.fits("x", {rows, rows});
  check.fits("x", {width_x, width_x});
  check.fits("y", {width_y, width_y});
  check.fits_gpu("x", "rows", rows);
  check.fits_gpu("x", "columns", width_x);
  check.fits_gpu("y", "columns", width_y);
  check.positive("positions", positions);
  if (rows % positions) check.fail("positions must divide the number of rows ", rows, ", got ", positions);
  check.finite("coefficients", coefficients, 4, "factors");
  check.holds("plan", plan, 3, "form codes");
  check.plan("plan", plan, 0, grad_y);
}

}  // namespace kdkernels
