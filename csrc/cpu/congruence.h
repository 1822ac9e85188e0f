// Sums of squared differences between two Gram matrices, with gradients, in sample space or in feature space.
#pragma once

#include <cstdint>

#include "gemm.h"

namespace kdkernels {

// Factors of four sums of D²: over all pairs, over pairs of one image, over pairs of one position, and over the diagonal.
struct Coefficients {
  double full, intra, inter_same, diagonal;
};

// The space in which a loss is computed, numbered as in kdkernels/ops/congruence/plan.py. Mixed takes the student's norm in
// feature space. It takes the teacher's norm and the cross term in sample space.
enum class Form : int64_t { gram = 0, mixed = 1, feature = 7 };

struct Plan {
  Form full, intra, inter_same;
};

// Row r belongs to image r / positions and position r % positions.
template <typename T>
struct Congruence {
  View<T> x, y;
  int64_t rows, width_x, width_y, positions;
  Coefficients coefficients;
  Plan plan;

  // Return the loss. Write the gradients that are not null, rows x width each.
  double run(T* grad_x, T* grad_y) const;
};

inline Coefficients coefficients_of(const double* c) { return {c[0], c[1], c[2], c[3]}; }
inline Plan plan_of(const int64_t* codes) { return {Form(codes[0]), Form(codes[1]), Form(codes[2])}; }

}  // namespace kdkernels
