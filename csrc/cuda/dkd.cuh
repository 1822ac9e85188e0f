// Decoupled knowledge distillation, one block per row of logits. The row stays in the caches. One pass finds the maxima,
// one sums exponentials, and one computes the divergence and the student's gradient. The teacher's gradient takes three
// more passes. The label's logit takes part in none of them.
#pragma once

#include <cmath>

#include "../two_classes.h"
#include "logits.cuh"
#include "reduce.cuh"

namespace kdkernels {

// How many rows count.
__global__ void __launch_bounds__(kReduceThreads)
    count_labels_kernel(const int64_t* labels, int64_t stride, int64_t rows, int64_t ignore_index, double* count) {
  double part = 0;
  for (int64_t i = threadIdx.x; i < rows; i += kReduceThreads) part += labels[i * stride] != ignore_index;
  part = block_reduce(part, Sum<double>());
  if (threadIdx.x == 0) *count = part;
}

struct DkdSettings {
  double alpha, beta, temperature;
  int64_t reduction, ignore_index;  // reduction: 0 mean, 1 sum, 2 one loss per row

  __device__ double divisor(double count) const { return reduction == 0 && count > 1 ? count : 1; }
};

// losses[row] = alpha TCKD + beta NCKD, and the gradients of the whole loss if they are wanted. With p and q the softmax
// of teacher and student over the other classes. A label that is no class gives NaN.
template <typename T>
__global__ void __launch_bounds__(512, sizeof(T) == sizeof(float) ? 2 : 1)
    dkd_kernel(Logits student, Logits teacher, const int64_t* labels, int64_t label_stride, const double* count,
               int64_t classes, DkdSettings settings, double* losses, T* grad_student, T* grad_teacher) {
  const int64_t row = blockIdx.x, first = threadIdx.x, step = blockDim.x, label = labels[row * label_stride];
  T* const out_student = grad_student ? grad_student + row * classes : nullptr;
  T* const out_teacher = grad_teacher ? grad_teacher + row * classes : nullptr;
  if (label == settings.ignore_index || label < 0 || label >= classes) {
    const T value = label == settings.ignore_index ? T(0) : T(NAN);
    for (int64_t j = first; j < classes; j += step) {
      if (out_student) out_student[j] = value;
      if (out_teacher) out_teacher[j] = value;
    }
    if (threadIdx.x == 0) losses[row] = double(value);
    return;
  }
  const auto of_student = [&](int64_t j) {
    return read<T>(student.data, student.type, row * student.row_stride + j * student.stride);
  };
  const auto of_teacher = [&](int64_t j) {
    return read<T>(teacher.data, teacher.type, row * teacher.row_stride + j * teacher.stride);
  };
  const T inverse_temperature = T(1 / settings.temperature), infinity = T(INFINITY);

  T max_student = -infinity, max_teacher = -infinity;
  for (int64_t j = first; j < classes; j += step) {
    if (j == label) continue;
    max_student = Largest<T>()(max_student, of_student(j));
    max_teacher = Largest<T>()(max_teacher, of_teacher(j));
  }
  max_student = block_reduce(max_student, Largest<T>());
  max_teacher = block_reduce(max_teacher, Largest<T>());
  if (max_student == -infinity) max_student = 0;
  if (max_teacher == -infinity) max_teacher = 0;

  // The maximum is subtracted before anything is rounded. Near the maximum, the difference is exact.
  const auto below_student = [&](int64_t j) { return (of_student(j) - max_student) * inverse_temperature; };
  const auto below_teacher = [&](int64_t j) { return (of_teacher(j) - max_teacher) * inverse_temperature; };
  T part_student = 0, part_teacher = 0;
  for (int64_t j = first; j < classes; j += step) {
    if (j == label) continue;
    part_student += exp(below_student(j));
    part_teacher += exp(below_teacher(j));
  }
  const double sum_student = block_reduce(double(part_student), Sum<double>());
  const double sum_teacher = block_reduce(double(part_teacher), Sum<double>());
  const bool no_student = sum_student == 0, no_teacher = sum_teacher == 0;  // the maximum would not tell -inf from NaN
  const T inverse_p = T(sum_teacher == 0 ? 0 : 1 / sum_teacher), inverse_q = T(sum_student == 0 ? 0 : 1 / sum_student),
          log_sums = T(log(sum_student / sum_teacher));

  // The label against all other classes.
  const T label_student = of_student(label), label_teacher = of_teacher(label);
  const auto margin = [&](T logit, T max, double sum) {
    return logit == infinity ? double(NAN) : (double(logit) - double(max)) / settings.temperature - log(sum);
  };
  TwoClasses pair;
  if (!(no_student && no_teacher) && !(label_student == -infinity && label_teacher == -infinity))
    pair = TwoClasses(margin(label_student, max_student, sum_student), margin(label_teacher, max_teacher, sum_teacher));
  const double factor = settings.temperature / settings.divisor(*count), beta = no_teacher ? 0 : settings.beta;
  const T pair_student = T(factor * settings.alpha * pair.student);
  const T pair_teacher = T(factor * settings.alpha * pair.teacher), of_others = T(factor * beta);

  // KL(p, q) = sum of p log(p / q) - p + q, as in kd.
  double part = 0;
  for (int64_t j = first; j < classes; j += step) {
    if (j == label) continue;
    const T s = of_student(j), t = of_teacher(j);
    const T p = exp((t - max_teacher) * inverse_temperature) * inverse_p;
    const T q = exp((s - max_student) * inverse_temperature) * inverse_q;
    // If the teacher's logit is -inf, p is 0 and any d will do. If the student's is, p may have been rounded to 0.
    const T d = t == -infinity ? T(-1) : (t - max_teacher - (s - max_student)) * inverse_temperature + log_sums;
    const T product = d == infinity ? d : p * d;
    const bool small = d < T(0.5) && d > T(-0.5);
    const T term = small ? p * exp_remainder(d) : product - (p - q);
    part += double(term);
    if (out_student) out_student[j] = of_others * (small ? term - p * d : q - p) - pair_student * q;
  }
  double divergence = block_reduce(part, Sum<double>());
  // A student without other classes excludes what the teacher expects. A teacher without them expects nothing.
  if (no_student) divergence = INFINITY;
  if (threadIdx.x == 0) {
    losses[row] = settings.alpha * pair.divergence + (beta == 0 ? 0 : beta * divergence);
    if (out_student) out_student[label] = pair_student;
    if (out_teacher) out_teacher[label] = pair_teacher;
  }

  if (!out_teacher) return;
  // Logarithms are relative to the teacher's largest class, as in kd.
  T student_there = -infinity;
  for (int64_t j = first; j < classes; j += step)
    if (j != label && of_teacher(j) == max_teacher) student_there = Largest<T>()(student_there, of_student(j));
  student_there = block_reduce(student_there, Largest<T>());
  const auto weighted = [&](int64_t j, T mean, T rest) {
    const T e = exp(below_teacher(j));
    const T ratio = (of_teacher(j) - max_teacher - (of_student(j) - student_there)) * inverse_temperature;
    return e == 0 ? T(0) : e * inverse_p * (rest == 0 ? ratio : of_others * (ratio - mean) - pair_teacher);
  };
  double part_mean = 0;
  for (int64_t j = first; j < classes; j += step)
    if (j != label) part_mean += double(weighted(j, T(0), T(0)));
  const T mean = T(block_reduce(part_mean, Sum<double>()));
  for (int64_t j = first; j < classes; j += step)
    if (j != label) out_teacher[j] = weighted(j, mean, T(1));
}

// The loss from the rows, in a fixed order, or the loss of each row.
template <typename T>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_dkd_kernel(const double* losses, int64_t rows, const double* count, DkdSettings settings, T* loss) {
  const double scale = settings.temperature * settings.temperature / settings.divisor(*count);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < rows; i += kReduceThreads) {
    if (settings.reduction == 2) loss[i] = T(scale * losses[i]);
    sum += losses[i];
  }
  sum = block_reduce(sum, Sum<double>());
  if (threadIdx.x == 0 && settings.reduction < 2) *loss = T(scale * sum);
}

}  // namespace kdkernels
