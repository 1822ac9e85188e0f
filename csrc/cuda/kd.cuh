// Temperature-softened KL divergence, a block per row of logits: three passes over the row, which the caches keep, for its
// maxima, for the sums of exponentials, for the divergence and the student's gradient; and three more for the teacher's.
#pragma once

#include <cmath>

#include "logits.cuh"

namespace kdkernels {

// With p and q the softmax of teacher and student: losses[row] = KL(p, q), and factor times its gradients, where wanted.
template <typename T>
__global__ void __launch_bounds__(512, sizeof(T) == sizeof(float) ? 2 : 1)
    kd_kernel(Logits student, Logits teacher, int64_t classes, T inverse_temperature, T factor, double* losses,
              T* grad_student, T* grad_teacher) {
  const int64_t row = blockIdx.x, first = threadIdx.x, step = blockDim.x;
  const auto of_student = [&](int64_t j) {
    return read<T>(student.data, student.type, row * student.row_stride + j * student.stride);
  };
  const auto of_teacher = [&](int64_t j) {
    return read<T>(teacher.data, teacher.type, row * teacher.row_stride + j * teacher.stride);
  };

  T max_student = of_student(0), max_teacher = of_teacher(0);
  for (int64_t j = first; j < classes; j += step) {
    max_student = Largest<T>()(max_student, of_student(j));
    max_teacher = Largest<T>()(max_teacher, of_teacher(j));
  }
  max_student = block_reduce(max_student, Largest<T>());
  max_teacher = block_reduce(max_teacher, Largest<T>());

  // The maximum is subtracted before anything is rounded: near it the difference is exact.
  const auto below_student = [&](int64_t j) { return (of_student(j) - max_student) * inverse_temperature; };
  const auto below_teacher = [&](int64_t j) { return (of_teacher(j) - max_teacher) * inverse_temperature; };
  T part_student = 0, part_teacher = 0;
  for (int64_t j = first; j < classes; j += step) {
    part_student += exp(below_student(j));
    part_teacher += exp(below_teacher(j));
  }
  const double sum_student = block_reduce(double(part_student), Sum<double>());
  const double sum_teacher = block_reduce(double(part_teacher), Sum<double>());
  const T inverse_p = T(1 / sum_teacher), inverse_q = T(1 / sum_student), log_sums = T(log(sum_student / sum_teacher));

  // KL(p, q) = sum of p log(p / q) - p + q. With d = log(p / q) each term is p (exp(-d) - 1 + d) >= 0, so that a small
  // divergence is as precise as a large one.
  double part = 0;
  for (int64_t j = first; j < classes; j += step) {
    const T s = below_student(j), t = below_teacher(j);
    const T p = exp(t) * inverse_p, q = exp(s) * inverse_q;
    const T d = (of_teacher(j) - max_teacher - (of_student(j) - max_student)) * inverse_temperature + log_sums;
    const bool small = d < T(0.5) && d > T(-0.5);
    const T term = small ? p * exp_remainder(d) : p * d - (p - q);
    part += double(term);
    if (grad_student) grad_student[row * classes + j] = factor * (small ? term - p * d : q - p);
  }
  const double divergence = block_reduce(part, Sum<double>());
  if (threadIdx.x == 0) losses[row] = divergence;

  if (!grad_teacher) return;
  // p (log(p / q) - divergence), with logarithms counted from that of the teacher's largest class: where its p is nearly 1 the
  // divergence is nearly its logarithm, and the difference would be lost.
  T student_there = -T(INFINITY);
  for (int64_t j = first; j < classes; j += step)
    if (of_teacher(j) == max_teacher) student_there = Largest<T>()(student_there, of_student(j));
  student_there = block_reduce(student_there, Largest<T>());
  const auto log_ratio = [&](int64_t j) {
    return (of_teacher(j) - max_teacher - (of_student(j) - student_there)) * inverse_temperature;
  };
  double part_mean = 0;
  for (int64_t j = first; j < classes; j += step) part_mean += double(exp(below_teacher(j)) * log_ratio(j));
  const T mean = T(block_reduce(part_mean, Sum<double>()) / sum_teacher);
  for (int64_t j = first; j < classes; j += step)
    grad_teacher[row * classes + j] = factor * exp(below_teacher(j)) * inverse_p * (log_ratio(j) - mean);
}

}  // namespace kdkernels
