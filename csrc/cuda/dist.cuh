// DIST: Pearson's correlation of two networks' probabilities, in each row and in each column. A kernel by rows writes the
// probabilities, a kernel by columns reads them, and a kernel by rows writes the gradients. A class that is not there, and
// every class of a row that does not count, has -1 in place of a probability.
//
// 1 - r is half the squared distance of the two lines, centred and divided by their norms. So it is precise if r is nearly
// 1.
#pragma once

#include <cmath>

#include "logits.cuh"
#include "reduce.cuh"

namespace kdkernels {

constexpr double kDistEps = 1e-8;  // is added to the product of two norms

template <typename T>
__device__ bool is_there(T probability) {
  return !(probability < T(-0.5));  // NaN is there
}

// A row or a column: 1 - r, and the derivatives of r. The derivative to q is both (p - mean) - student (q - mean), and to
// p both (q - mean) - teacher (p - mean). `there` is the number of entries.
struct DistLine {
  double difference, both, student, teacher;
  int64_t there;

  // student, teacher: the squared norms of the centred lines. distance: the squared distance of the lines times their
  // inverse norms, which are rounded.
  static __device__ DistLine of(double student, double teacher, double inverse_s, double inverse_t, double distance,
                                int64_t there) {
    const double norm_s = sqrt(student), norm_t = sqrt(teacher), norms = norm_s * norm_t, sum = norms + kDistEps;
    if (norms == 0) return {1, 1 / sum, 0, 0, there};
    const double of_s = norm_s * inverse_s, of_t = norm_t * inverse_t;  // nearly 1
    distance = (distance - (of_s - of_t) * (of_s - of_t)) / (of_s * of_t);
    const double r = norms * (1 - distance / 2) / sum;
    return {(norms * distance / 2 + kDistEps) / sum, 1 / sum, r * norm_t / (norm_s * sum), r * norm_s / (norm_t * sum),
            there};
  }
};

// What the numbers of a column are relative to: its largest number, so that equal samples differ by exactly 0, and the
// mean of the differences.
template <typename T>
struct DistCentre {
  T shift[2], mean[2];
};

template <typename T>
struct Probabilities {
  T* of[2];  // [rows][classes] of student and teacher
  int64_t rows, classes;
};

template <typename T>
__global__ void __launch_bounds__(512, sizeof(T) == sizeof(float) ? 2 : 1)
    dist_rows_kernel(Logits student, Logits teacher, const bool* mask, int64_t mask_stride, T inverse_temperature,
                     Probabilities<T> probabilities, DistLine* lines) {
  const int64_t row = blockIdx.x, first = threadIdx.x, step = blockDim.x, classes = probabilities.classes;
  T *const q_row = probabilities.of[0] + row * classes, *const p_row = probabilities.of[1] + row * classes;
  if (mask && !mask[row * mask_stride]) {
    for (int64_t j = first; j < classes; j += step) q_row[j] = p_row[j] = T(-1);
    if (threadIdx.x == 0) lines[row] = {0, 0, 0, 0, 0};
    return;
  }
  const auto of_student = [&](int64_t j) {
    return read<T>(student.data, student.type, row * student.row_stride + j * student.stride);
  };
  const auto of_teacher = [&](int64_t j) {
    return read<T>(teacher.data, teacher.type, row * teacher.row_stride + j * teacher.stride);
  };
  const T infinity = T(INFINITY);
  T max_student = -infinity, max_teacher = -infinity;
  for (int64_t j = first; j < classes; j += step) {
    max_student = Largest<T>()(max_student, of_student(j));
    max_teacher = Largest<T>()(max_teacher, of_teacher(j));
  }
  max_student = block_reduce(max_student, Largest<T>());
  max_teacher = block_reduce(max_teacher, Largest<T>());
  T part_student = 0, part_teacher = 0;
  double part_there = 0;
  for (int64_t j = first; j < classes; j += step) {
    const T s = of_student(j), t = of_teacher(j);
    const bool there = !(s == -infinity && t == -infinity);
    const T q = exp((s - max_student) * inverse_temperature), p = exp((t - max_teacher) * inverse_temperature);
    q_row[j] = there ? q : T(-1);
    p_row[j] = there ? p : T(-1);
    part_student += there ? q : T(0);
    part_teacher += there ? p : T(0);
    part_there += there;
  }
  const T inverse_s = T(1 / block_reduce(double(part_student), Sum<double>()));
  const T inverse_t = T(1 / block_reduce(double(part_teacher), Sum<double>()));
  const double there = block_reduce(part_there, Sum<double>());
  const T mean = T(1 / there);
  double norm_s = 0, norm_t = 0;
  for (int64_t j = first; j < classes; j += step) {
    if (!is_there(q_row[j])) continue;
    const T q = q_row[j] * inverse_s, p = p_row[j] * inverse_t;
    q_row[j] = q;
    p_row[j] = p;
    norm_s += double((q - mean) * (q - mean));
    norm_t += double((p - mean) * (p - mean));
  }
  norm_s = block_reduce(norm_s, Sum<double>());
  norm_t = block_reduce(norm_t, Sum<double>());
  const T inverse_q = T(1 / sqrt(norm_s)), inverse_p = T(1 / sqrt(norm_t));
  double distance = 0;
  for (int64_t j = first; j < classes; j += step) {
    if (!is_there(q_row[j])) continue;
    const T d = (q_row[j] - mean) * inverse_q - (p_row[j] - mean) * inverse_p;
    distance += double(d * d);
  }
  distance = block_reduce(distance, Sum<double>());
  if (threadIdx.x == 0) lines[row] = DistLine::of(norm_s, norm_t, inverse_q, inverse_p, distance, int64_t(there));
}

// Combine the numbers of a column, one of each line of threads, in a fixed order.
template <typename Combine>
__device__ double over_lines(double value, Combine combine) {
  SHARED_ARRAY(double, of_threads, kCentreColumns* kCentreLines);
  __syncthreads();  // threads may still read an earlier result
  of_threads[threadIdx.x] = value;
  __syncthreads();
  value = of_threads[threadIdx.x % kCentreColumns];
  for (int line = 1; line < kCentreLines; ++line)
    value = combine(value, of_threads[line * kCentreColumns + threadIdx.x % kCentreColumns]);
  return value;
}

template <typename T>
__global__ void __launch_bounds__(kCentreColumns* kCentreLines)
    dist_columns_kernel(Probabilities<T> probabilities, DistLine* lines, DistCentre<T>* centres) {
  const int64_t own = int64_t(blockIdx.x) * kCentreColumns + threadIdx.x % kCentreColumns;
  const int64_t classes = probabilities.classes, column = own < classes ? own : classes - 1;
  const auto for_samples = [&](const auto& f) {
    for (int64_t i = threadIdx.x / kCentreColumns; i < probabilities.rows; i += kCentreLines) {
      const T q = probabilities.of[0][i * classes + column];
      if (is_there(q)) f(q, probabilities.of[1][i * classes + column]);
    }
  };
  double largest_s = -1, largest_t = -1, number = 0;
  for_samples([&](T q, T p) {
    largest_s = Largest<double>()(largest_s, double(q));
    largest_t = Largest<double>()(largest_t, double(p));
    number += 1;
  });
  const T shift_s = T(over_lines(largest_s, Largest<double>())), shift_t = T(over_lines(largest_t, Largest<double>()));
  const double there = over_lines(number, Sum<double>());
  double sum_s = 0, sum_t = 0;
  for_samples([&](T q, T p) {
    sum_s += double(q - shift_s);
    sum_t += double(p - shift_t);
  });
  const double samples = there > 1 ? there : 1;
  const T mean_s = T(over_lines(sum_s, Sum<double>()) / samples),
          mean_t = T(over_lines(sum_t, Sum<double>()) / samples);
  double norm_s = 0, norm_t = 0;
  for_samples([&](T q, T p) {
    const T a = q - shift_s - mean_s, b = p - shift_t - mean_t;
    norm_s += double(a * a);
    norm_t += double(b * b);
  });
  norm_s = over_lines(norm_s, Sum<double>());
  norm_t = over_lines(norm_t, Sum<double>());
  const T inverse_q = T(1 / sqrt(norm_s)), inverse_p = T(1 / sqrt(norm_t));
  double distance = 0;
  for_samples([&](T q, T p) {
    const T d = (q - shift_s - mean_s) * inverse_q - (p - shift_t - mean_t) * inverse_p;
    distance += double(d * d);
  });
  distance = over_lines(distance, Sum<double>());
  if (own >= classes || threadIdx.x >= kCentreColumns) return;
  lines[own] = DistLine::of(norm_s, norm_t, inverse_q, inverse_p, distance, int64_t(there));
  centres[own] = {{shift_s, shift_t}, {mean_s, mean_t}};
}

// The loss, and the weights of a row's and of a column's derivatives.
template <typename T>
__global__ void __launch_bounds__(kReduceThreads)
    dist_loss_kernel(const DistLine* rows, int64_t row_count, const DistLine* columns, int64_t column_count,
                     double beta, double gamma, T* loss, double* weights) {
  const auto mean = [](const DistLine* lines, int64_t count, double& number) {
    double sum = 0, lines_there = 0;
    for (int64_t i = threadIdx.x; i < count; i += kReduceThreads) {
      if (lines[i].there == 0) continue;
      sum += lines[i].difference;
      lines_there += 1;
    }
    number = block_reduce(lines_there, Sum<double>());
    if (number == 0) number = 1;
    return block_reduce(sum, Sum<double>()) / number;
  };
  double samples, classes;
  const double inter = mean(rows, row_count, samples), intra = mean(columns, column_count, classes);
  if (threadIdx.x > 0) return;
  *loss = T(beta * inter + gamma * intra);
  weights[0] = beta / samples;
  weights[1] = gamma / classes;
}

// The gradient of one network's logits, own (mean of w - w) / T, where the gradient to its probabilities is -w. It is
// taken relative to the largest class, so that nothing cancels if its probability is nearly 1.
template <typename T>
__global__ void __launch_bounds__(512)
    dist_gradient_kernel(Probabilities<T> probabilities, const DistLine* rows, const DistLine* columns,
                         const DistCentre<T>* centres, const double* weights, int network, T inverse_temperature,
                         T* grad) {
  const int64_t row = blockIdx.x, first = threadIdx.x, step = blockDim.x, classes = probabilities.classes;
  const T* const own = probabilities.of[network] + row * classes;
  const T* const other = probabilities.of[1 - network] + row * classes;
  T* const out = grad + row * classes;
  const DistLine line = rows[row];
  if (line.there == 0) {
    for (int64_t j = first; j < classes; j += step) out[j] = 0;
    return;
  }
  const auto own_of = [&](const DistLine& of) { return network == 0 ? of.student : of.teacher; };
  const T mean = T(1 / double(line.there)), row_both = T(weights[0] * line.both),
          row_own = T(weights[0] * own_of(line));
  T largest = -1;
  for (int64_t j = first; j < classes; j += step) largest = Largest<T>()(largest, own[j]);
  largest = block_reduce(largest, Largest<T>());
  T top = -T(INFINITY);
  for (int64_t j = first; j < classes; j += step) {
    const DistLine& column = columns[j];
    const DistCentre<T>& centre = centres[j];
    const T q = own[j], p = other[j];
    const T of_row = row_both * (p - mean) - row_own * (q - mean);
    const T w = of_row + T(weights[1] * column.both) * (p - centre.shift[1 - network] - centre.mean[1 - network]) -
                T(weights[1] * own_of(column)) * (q - centre.shift[network] - centre.mean[network]);
    out[j] = w;
    if (is_there(q) && q == largest) top = Largest<T>()(top, w);
  }
  top = block_reduce(top, Largest<T>());
  if (top == -T(INFINITY)) top = 0;
  double part = 0;
  for (int64_t j = first; j < classes; j += step)
    if (is_there(own[j])) part += double(own[j] * (out[j] - top));
  const T average = T(block_reduce(part, Sum<double>()));
  for (int64_t j = first; j < classes; j += step)
    out[j] = is_there(own[j]) ? own[j] * (average - (out[j] - top)) * inverse_temperature : T(0);
}

}  // namespace kdkernels
