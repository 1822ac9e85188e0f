// Every native operator: its schema, and where its CPU implementation is registered.
#include <torch/csrc/stable/library.h>

#include "cpu/operators.h"

STABLE_TORCH_LIBRARY(kdkernels, m) {
  // Gradients are those of the loss, in float32 (float64 for float64 inputs); empty when not wanted.
  m.def(
      "kd(Tensor student, Tensor teacher, float temperature, float scale, bool grad_student, bool grad_teacher)"
      " -> (Tensor loss, Tensor grad_student, Tensor grad_teacher)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {}
