// What divergence and divergence_backward expect of their arguments.
#pragma once

#include "check.h"

namespace kdkernels {

// Numbers that the forward kernel saves for each row. A call with moments saves all of them.
constexpr int64_t kSavedNumbers = 5, kSavedMoments = 16;

inline void check_rows(Check& check, const Tensor& student, const Tensor& teacher, const Tensor& temperatures,
                       int64_t kind, double beta) {
  check.tensor("student", student, "outer inner K");
  check.tensor("teacher", teacher, "outer inner K");
  check.tensor("temperatures", temperatures, "outer inner", Types::full_float);
  if (kind < 0 || kind > 2) check.fail("kind must be 0 (forward), 1 (reverse) or 2 (jsd), got ", kind);
  if (!(beta >= 0 && beta <= 1)) check.fail("beta must be a number in [0, 1], got ", beta);
}

inline void check_divergence(const Tensor& student, const Tensor& teacher, const Tensor& temperatures, int64_t kind,
                             double beta) {
  Check check("divergence");
  check_rows(check, student, teacher, temperatures, kind, beta);
}

inline void check_divergence_backward(const Tensor& grad_losses, const Tensor& student, const Tensor& teacher,
                                      const Tensor& temperatures, const Tensor& saved, int64_t kind, double beta,
                                      bool standardize, bool moments, bool grad_student, bool grad_teacher,
                                      bool to_temperatures) {
  Check check("divergence_backward");
  check_rows(check, student, teacher, temperatures, kind, beta);
  check.tensor("grad_losses", grad_losses, "outer inner", Types::full_float);
  const bool grad_first = kind == 1 ? grad_student : grad_teacher;
  if (!moments && (to_temperatures || grad_first || ((standardize || kind == 2) && (grad_student || grad_teacher))))
    check.fail("moments must be true for these gradients, got false");
  check.bind("numbers", moments ? kSavedMoments : kSavedNumbers);
  check.tensor("saved", saved, "outer inner numbers", Types::full_float);
  const bool of_teacher = teacher.scalar_type() == torch::headeronly::ScalarType::Double;
  check.compute_type("saved", saved, of_teacher ? "teacher" : "student", of_teacher ? teacher : student);
}

}  // namespace kdkernels
