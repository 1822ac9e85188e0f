// The CPU implementations of the native operators; csrc/library.cpp has their schemas and registers them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

namespace kdkernels {

using torch::stable::Tensor;

// Loss, gradient to the student, gradient to the teacher; a gradient that is not wanted is empty.
std::tuple<Tensor, Tensor, Tensor> kd(const Tensor& student, const Tensor& teacher, double temperature, double scale,
                                      bool grad_student, bool grad_teacher);

}  // namespace kdkernels
