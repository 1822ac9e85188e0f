// Temperature-softened KL divergence, one block per row of logits. The row stays in the caches. One pass finds the
// maxima, one sums exponentials, and one computes the divergence and the student's gradient. The teacher's gradient
// takes three more passes.
#pragma once

#include <cmath>

#include "logits.cuh"

namespace kdkernels {

// With p and q the softmax of teacher and student: losses[row] = KL(p, q), and factor times its gradients if they are
// wanted.
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

  // The maximum is subtracted before anything is rounded. Near the maximum, the difference is exact.
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

  // KL(p, q) = sum of p log(p / q) - p + q. With d = log(p / q), each term is p (exp(-d) - 1 + d) >= 0. So a small
  // divergence is as precise as a large one.
  double part = 0;
  for (int64_t j = first; j < classes; j += step) {
    const T s = below_student(j), t = below_teacher(j);
    const T p = exp(t) * inverse_p, q = exp(s) * inverse_q;
    // A logit of -inf is an absent class. If the teacher has -inf, p is 0, and any d will do.
    const bool absent = of_teacher(j) == -T(INFINITY), only_teacher = !absent && of_student(j) == -T(INFINITY);
    const T ratio = (of_teacher(j) - max_teacher - (of_student(j) - max_student)) * inverse_temperature + log_sums;
    const T d = absent ? T(1) : ratio;
    const bool small = d < T(0.5) && d > T(-0.5);
    const T term = only_teacher ? T(INFINITY) + log_sums : small ? p * exp_remainder(d) : p * d - (p - q);
    part += double(term);
    if (grad_student) grad_student[row * classes + j] = factor * (small ? term - p * d : q - p);
  }
  const double divergence = block_reduce(part, Sum<double>());
  if (threadIdx.x == 0) losses[row] = divergence;

  if (!grad_teacher) return;
  // p (log(p / q) - divergence), with logarithms relative to the teacher's largest class. If its p is nearly 1, the
  // divergence is nearly its logarithm, and the difference would cancel.
  T student_there = -T(INFINITY);
  for (int64_t j = first; j < classes; j += step)
    if (of_teacher(j) == max_teacher) student_there = Largest<T>()(student_there, of_student(j));
  student_there = block_reduce(student_there, Largest<T>());
  if (student_there == -T(INFINITY)) student_there = max_student;
  // An absent class has the logarithm 0.
  const T of_absent = (student_there - max_student) * inverse_temperature - log_sums;
  const auto log_ratio = [&](int64_t j) {
    const T t = of_teacher(j), s = of_student(j);
    if (t == -T(INFINITY) || s == -T(INFINITY)) return of_absent;
    return (t - max_teacher - (s - student_there)) * inverse_temperature;
  };
  double part_mean = 0;
  for (int64_t j = first; j < classes; j += step) part_mean += double(exp(below_teacher(j)) * log_ratio(j));
  const T mean = T(block_reduce(part_mean, Sum<double>()) / sum_teacher);
  for (int64_t j = first; j < classes; j += step)
    grad_teacher[row * classes + j] = factor * exp(below_teacher(j)) * inverse_p * (log_ratio(j) - mean);
}

}  // namespace kdkernels
