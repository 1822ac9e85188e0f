// What top_k and top_k_backward expect of their arguments.
#pragma once

#include "check.h"

namespace kdkernels {

inline void check_top_k(Check& check, const Tensor& student, const Tensor& indices, const Tensor& temperatures) {
  check.tensor("student", student, "N K");
  check.tensor("indices", indices, "N k", Types::labels);
  check.tensor("temperatures", temperatures, "N", Types::full_float);
  if (indices.size(1) > student.size(1))
    check.fail("indices must have at most ", student.size(1), " columns, got ", indices.size(1));
}

inline void check_top_k_backward(const Tensor& grad_exponents, const Tensor& student, const Tensor& indices,
                                 const Tensor& temperatures) {
  Check check("top_k_backward");
  check_top_k(check, student, indices, temperatures);
  check.bind("width", indices.size(1) + 1);
  check.tensor("grad_exponents", grad_exponents, "N width", Types::full_float);
  check.compute_type("grad_exponents", grad_exponents, "student", student);
}

}  // namespace kdkernels
