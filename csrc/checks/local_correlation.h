// What local_correlation and local_correlation_backward expect of their arguments.
#pragma once

#include "patches.h"

namespace kdkernels {

inline void check_local_correlation(const std::vector<Tensor>& students, const std::vector<Tensor>& teachers,
                                    const std::vector<Tensor>& masks, const std::vector<int64_t>& k,
                                    const std::vector<double>& weights, const std::vector<int64_t>& plans,
                                    std::optional<double> threshold, bool resize, double eps,
                                    const std::vector<int64_t>& wanted) {
  Check check("local_correlation");
  check.not_empty("students", students);
  const int64_t stages = students.size();
  check.holds("teachers", teachers, stages, "entries, one for each stage");
  check.holds("k", k, stages, "entries, one for each stage");
  if (!masks.empty()) check.holds("masks", masks, stages, "entries, one for each stage, or none");
  check.finite("weights", weights, 3, "factors");
  check.holds("plans", plans, 3 * stages, "form codes, three for each stage");
  check.flags("wanted", wanted, 2 * stages);
  for (int64_t s = 0; s < stages; ++s) {
    const Argument student("students", s), teacher("teachers", s), side("k", s);
    check.forget();
    check.tensor(student, students[s], "n c_S h_S w_S");
    check.tensor(teacher, teachers[s], "n c_T h_T w_T");
    patches_checks::maps(check, student, students[s], side, k[s], resize);
    patches_checks::maps(check, teacher, teachers[s], side, k[s], resize);
    for (const Tensor* maps : {&students[s], &teachers[s]}) {
      const int64_t images = maps->size(0), rows = images * k[s] * k[s];
      check.fits(student, {rows, rows});
      check.fits_gpu(student, "rows", rows);
      if (!masks.empty()) patches_checks::mask(check, {"masks", s}, masks[s], images, maps->size(2), maps->size(3));
    }
    check.plan("plans", plans, 3 * s, wanted[stages + s]);
  }
  patches_checks::threshold(check, threshold, "masks", !masks.empty());
  check.non_negative("eps", eps);
}

inline void check_local_correlation_backward(const Tensor& grad_loss, const std::vector<Tensor>& grad_rows,
                                             const std::vector<int64_t>& shapes, const std::vector<Tensor>& masks,
                                             const std::vector<int64_t>& k, std::optional<double> threshold,
                                             bool resize) {
  Check check("local_correlation_backward");
  check.not_empty("k", k);
  const int64_t stages = k.size();
  check.tensor("grad_loss", grad_loss, "", Types::full_float);
  check.holds("grad_rows", grad_rows, 2 * stages, "entries, two for each stage");
  check.holds("shapes", shapes, 8 * stages, "numbers, eight for each stage");
  if (!masks.empty()) check.holds("masks", masks, stages, "entries, one for each stage, or none");
  for (int64_t i = 0; i < 2 * stages; ++i) {
    const int64_t s = i % stages;
    const Argument rows("grad_rows", i);
    if (check.unwanted(rows, grad_rows[i])) continue;
    const auto cut = patches_checks::rows(check, rows, grad_rows[i], "shapes", shapes, 4 * i, {"k", s}, k[s], resize);
    if (!masks.empty()) patches_checks::mask(check, {"masks", s}, masks[s], cut.images, cut.height, cut.width);
  }
  patches_checks::threshold(check, threshold, "masks", !masks.empty());
}

}  // namespace kdkernels
