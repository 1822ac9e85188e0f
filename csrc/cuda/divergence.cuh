// Divergences of softened class probabilities, one block per row of logits. The forward kernel reads a row twice: for
// maxima and sums of exponentials, and for the divergence. Standardised logits are read twice more. The backward kernel
// reads a row once. Exponentials are computed again, because nothing of the size of a row is kept.
//
// p and q are the softmax of slope (x - max) of two rows x and y. KL(p, q) is the forward divergence if x is the
// teacher, and the reverse divergence if x is the student. JSD takes x from the teacher. csrc/cpu/divergence.cpp
// computes the same terms.
#pragma once

#include <cmath>
#include <limits>

#include "../divergence.h"
#include "logits.cuh"

namespace kdkernels {

template <typename T>
constexpr T kLowest = std::numeric_limits<T>::lowest();  // -inf minus it is -inf

// Blocks of 512 threads on a multiprocessor. Two of them leave 64 registers per thread, which `many` numbers exceed.
template <typename T, bool many>
constexpr int kBlocks = sizeof(T) == sizeof(float) && !many ? 2 : 1;

// Rows of logits, outer x inner x K, or one number per row, outer x inner. Any strides.
struct DivergenceRows {
  void* data;
  Element type;
  int64_t inner, outer_stride, inner_stride, stride;

  __device__ int64_t place(int64_t row) const { return row / inner * outer_stride + row % inner * inner_stride; }
  __device__ double number_of(int64_t row) const { return read<double>(data, type, place(row)); }
};

template <typename T>
struct DivergenceRow {
  const DivergenceRows& rows;
  int64_t place;

  __device__ DivergenceRow(const DivergenceRows& rows, int64_t row) : rows(rows), place(rows.place(row)) {}
  __device__ T operator[](int64_t j) const { return read<T>(rows.data, rows.type, place + j * rows.stride); }
  __device__ void set(int64_t j, T value) const { write<T>(rows.data, rows.type, place + j * rows.stride, value); }
};

// One network's row: its softmax, the mean and standard deviation of `count` logits, and what the gradients need of all
// classes.
template <typename T>
struct DivergenceNetwork {
  T max;
  double sum, slope;
  double centre = 0, deviation = 0, count = 0;
  double ratio = 0, moment = 0;

  __device__ void set_slope(double temperature, bool standardize) {
    slope = 1 / (temperature * (standardize ? deviation + kStandardEps : 1));
  }

  // Mean and standard deviation of the logits above -inf.
  __device__ void measure(const DivergenceRow<T>& x, int64_t classes) {
    double part = 0, part_count = 0;
    for (int64_t j = threadIdx.x; j < classes; j += blockDim.x) {
      const T value = x[j];
      if (value == -T(INFINITY)) continue;
      part += double(value);
      part_count += 1;
    }
    count = block_reduce(part_count, Sum<double>());
    centre = block_reduce(part, Sum<double>()) / count;
    part = 0;
    for (int64_t j = threadIdx.x; j < classes; j += blockDim.x) {
      const T value = x[j];
      const double above = double(value) - centre;
      if (value != -T(INFINITY)) part += above * above;
    }
    deviation = sqrt(block_reduce(part, Sum<double>()) / (count > 2 ? count - 1 : 1));
  }

  // Add a logit to this thread's sum of exponentials, which is relative to its largest logit.
  __device__ bool add(T value, T& largest, T& part) const {
    const bool above = value > largest;
    const T e = exp((above ? largest - value : value - largest) * T(slope));
    part = above ? part * e + T(1) : part + e;
    largest = above ? value : largest;
    return above;
  }

  // Combine the threads' sums. A sum of 0 belongs to a row of -inf.
  __device__ void combine(T largest, T part) {
    max = block_reduce(largest, Largest<T>());
    sum = block_reduce(double(part) * exp((double(largest) - double(max)) * slope), Sum<double>());
    if (sum == 0) sum = NAN;
  }
};

template <typename T>
struct DivergenceConstants {
  T max_p, max_q, slope_p, slope_q, gap, inverse_p, inverse_q, log_sums, top_q, of_absent, beta;

  // top: the logit of q in the class with the largest p, or the largest logit of q if q does not have this class.
  __device__ DivergenceConstants(const DivergenceNetwork<T>& p, const DivergenceNetwork<T>& q, T top, double weight)
      : max_p(p.max),
        max_q(q.max),
        slope_p(T(p.slope)),
        slope_q(T(q.slope)),
        gap(T(p.slope - q.slope)),
        inverse_p(T(1 / p.sum)),
        inverse_q(T(1 / q.sum)),
        log_sums(T(log(q.sum / p.sum))),
        top_q(top),
        of_absent((top - q.max) * T(q.slope) - log_sums),
        beta(T(weight)) {}
};

// Of one class: p, q, and r = log(p / q) up to a constant for the gradient to x. For JSD with m = β p + (1 - β) q,
// u = log(p / m) and v = log(q / m).
template <typename T>
struct DivergenceTerms {
  T p, q, below_p, below_q, loss, gradient_q, r, u, v;
};

template <typename T, bool is_jsd>
__device__ DivergenceTerms<T> terms_of(const DivergenceConstants<T>& c, T x, T y) {
  DivergenceTerms<T> t;
  // Subtract before anything is rounded. Near the maximum, the difference is exact.
  t.below_p = x - c.max_p;
  t.below_q = y - c.max_q;
  t.p = exp(t.below_p * c.slope_p) * c.inverse_p;
  t.q = exp(t.below_q * c.slope_q) * c.inverse_q;
  const T infinity = T(INFINITY), of_slopes = t.below_p * c.gap;
  T d = (t.below_p - t.below_q) * c.slope_q + of_slopes + c.log_sums;
  const bool no_p = x == -infinity, no_q = y == -infinity;
  if constexpr (is_jsd) {
    if (no_p) d = no_q ? T(0) : -infinity;
    if (no_q && !no_p) d = infinity;
    // With e = exp(-|d|), the logarithm of m over the larger of p and q is log(1 + w (e - 1)).
    const bool larger_p = d >= T(0);
    const T distance = larger_p ? d : -d, of_smaller = larger_p ? T(1) - c.beta : c.beta;
    const T log_m = log1p(of_smaller * expm1(-distance));
    t.u = larger_p ? -log_m : d - log_m;
    t.v = larger_p ? -log_m - d : -log_m;
    if (no_p) t.u = T(1);  // any number that is not near 0
    if (no_q) t.v = T(1);
    // β p (exp(-u) - 1 + u) + (1 - β) q (exp(-v) - 1 + v), where p exp(-u) = q exp(-v) = m. Each term is >= 0.
    const T m = c.beta * t.p + (T(1) - c.beta) * t.q;
    const bool near_p = t.u < T(0.5) && t.u > T(-0.5), near_q = t.v < T(0.5) && t.v > T(-0.5);
    const T of_p = near_p ? t.p * exp_remainder(t.u) : t.p * t.u - (t.p - m);
    const T of_q = near_q ? t.q * exp_remainder(t.v) : t.q * t.v - (t.q - m);
    t.loss = c.beta * of_p + (T(1) - c.beta) * of_q;
  } else {
    const bool only_p = no_q && !no_p;
    if (no_p || (t.p == T(0) && d < T(0))) d = T(1);  // any number, because p is 0
    // KL(p, q) = sum of p d - p + q. Each term is p (exp(-d) - 1 + d) >= 0. So a small divergence is as precise as a
    // large one.
    const T pd = t.p * d;
    const bool small = d < T(0.5) && d > T(-0.5);
    t.loss = small ? t.p * exp_remainder(d) : pd - (t.p - t.q);
    t.gradient_q = small ? t.loss - pd : t.q - t.p;
    if (only_p) t.loss = infinity + c.log_sums;
    // Relative to the class with the largest p. If this p is nearly 1, the divergence is nearly its logarithm, and the
    // difference of both would cancel. An absent class has the logarithm 0.
    t.r = only_p || t.p == T(0) ? c.of_absent : (t.below_p - (y - c.top_q)) * c.slope_q + of_slopes;
  }
  if (no_p) t.below_p = T(0);
  if (no_q) t.below_q = T(0);
  return t;
}

// losses[row], and saved[row] for the backward kernel. A row with the temperature 0 does not count.
template <typename T, bool is_jsd, bool with_moments>
__global__ void __launch_bounds__(512, kBlocks<T, with_moments>)
    divergence_kernel(DivergenceRows of_x, DivergenceRows of_y, DivergenceRows temperatures, int64_t classes,
                      double beta, bool standardize, T* losses, T* saved) {
  const int64_t row = blockIdx.x, first = threadIdx.x, step = blockDim.x;
  const DivergenceRow<T> x(of_x, row), y(of_y, row);
  const double temperature = temperatures.number_of(row);
  constexpr int64_t count = with_moments ? kSavedMoments : kSavedNumbers;
  T* const kept = saved + row * count;
  if (temperature == 0) {
    if (first < count) kept[first] = T(0);
    if (first == 0) losses[row] = T(0);
    return;
  }
  DivergenceNetwork<T> p, q;
  if (standardize) {
    p.measure(x, classes);
    q.measure(y, classes);
  }
  p.set_slope(temperature, standardize);
  q.set_slope(temperature, standardize);

  T largest_p = kLowest<T>, largest_q = kLowest<T>, part_p = 0, part_q = 0, top = -T(INFINITY);
  for (int64_t j = first; j < classes; j += step) {
    const T of_q = y[j];
    if (p.add(x[j], largest_p, part_p)) top = of_q;
    q.add(of_q, largest_q, part_q);
  }
  p.combine(largest_p, part_p);
  q.combine(largest_q, part_q);
  top = block_reduce(largest_p == p.max ? top : -T(INFINITY), Largest<T>());
  if (top == -T(INFINITY)) top = q.max;

  const DivergenceConstants<T> c(p, q, top, beta);
  double loss = 0, ratio_p = 0, ratio_q = 0, exponent_p = 0, exponent_q = 0, moment_p = 0, moment_q = 0;
  for (int64_t j = first; j < classes; j += step) {
    const DivergenceTerms<T> t = terms_of<T, is_jsd>(c, x[j], y[j]);
    loss += double(t.loss);
    if constexpr (with_moments) {
      const T a = t.below_p * c.slope_p, b = t.below_q * c.slope_q, of_p = t.p * (is_jsd ? t.u : t.r);
      ratio_p += double(of_p);
      exponent_p += double(t.p * a);
      moment_p += double(of_p * a);
      if constexpr (is_jsd) {
        ratio_q += double(t.q * t.v);
        exponent_q += double(t.q * b);
        moment_q += double(t.q * t.v * b);
      } else {
        moment_q += double(t.gradient_q * b);
      }
    }
  }
  loss = block_reduce(loss, Sum<double>());
  if (!(temperature > 0 && temperature < INFINITY)) loss = NAN;
  if constexpr (with_moments) {
    p.ratio = block_reduce(ratio_p, Sum<double>());
    exponent_p = block_reduce(exponent_p, Sum<double>());
    p.moment = (is_jsd ? beta : 1) * (block_reduce(moment_p, Sum<double>()) - p.ratio * exponent_p);
    q.moment = block_reduce(moment_q, Sum<double>());
    if constexpr (is_jsd) {
      q.ratio = block_reduce(ratio_q, Sum<double>());
      q.moment = (1 - beta) * (q.moment - q.ratio * block_reduce(exponent_q, Sum<double>()));
    }
  }
  if (first > 0) return;
  losses[row] = T(loss);
  const bool broken = loss != loss;  // then all gradients of the row are NaN
  kept[Saved::max_p] = p.max;
  kept[Saved::max_q] = q.max;
  kept[Saved::sum_p] = broken ? T(NAN) : T(p.sum);
  kept[Saved::sum_q] = broken ? T(NAN) : T(q.sum);
  kept[Saved::mode] = T(0);
  if constexpr (with_moments) {
    kept[Saved::top_q] = top;
    kept[Saved::mean_p] = T(p.ratio);
    kept[Saved::mean_q] = T(q.ratio);
    kept[Saved::moment_p] = T(p.moment);
    kept[Saved::moment_q] = T(q.moment);
    kept[Saved::centre_p] = T(p.centre);
    kept[Saved::centre_q] = T(q.centre);
    kept[Saved::deviation_p] = T(p.deviation);
    kept[Saved::deviation_q] = T(q.deviation);
    kept[Saved::count_p] = T(p.count);
    kept[Saved::count_q] = T(q.count);
  }
}

// The gradient of one row to the standard deviation of its logits, per distance from their mean.
template <typename T>
__device__ T spread_of(const DivergenceNetwork<T>& network, double factor, bool standardize) {
  const double deviation = network.deviation, degrees = network.count > 2 ? network.count - 1 : 1;
  if (!standardize || deviation == 0) return T(0);
  return T(factor * network.moment / (degrees * deviation * (deviation + kStandardEps)));
}

// factors[row] times the gradients of losses[row]. A gradient without data is not wanted.
template <typename T, bool is_jsd>
__global__ void __launch_bounds__(512, kBlocks<T, is_jsd>)
    divergence_backward_kernel(DivergenceRows of_x, DivergenceRows of_y, DivergenceRows temperatures,
                               DivergenceRows factors, const T* saved, bool moments, int64_t classes, double beta,
                               bool standardize, DivergenceRows grad_x, DivergenceRows grad_y, T* grad_temperatures) {
  const int64_t row = blockIdx.x, first = threadIdx.x, step = blockDim.x;
  const DivergenceRow<T> x(of_x, row), y(of_y, row), out_x(grad_x, row), out_y(grad_y, row);
  const double temperature = temperatures.number_of(row), factor = factors.number_of(row);
  if (temperature == 0) {
    for (int64_t j = first; j < classes; j += step) {
      if (grad_x.data) out_x.set(j, T(0));
      if (grad_y.data) out_y.set(j, T(0));
    }
    if (grad_temperatures && first == 0) grad_temperatures[row] = T(0);
    return;
  }
  const T* const kept = saved + row * (moments ? kSavedMoments : kSavedNumbers);
  DivergenceNetwork<T> p, q;
  p.max = kept[Saved::max_p];
  q.max = kept[Saved::max_q];
  p.sum = double(kept[Saved::sum_p]);
  q.sum = double(kept[Saved::sum_q]);
  T top = q.max;
  if (moments) {
    top = kept[Saved::top_q];
    p.ratio = double(kept[Saved::mean_p]);
    q.ratio = double(kept[Saved::mean_q]);
    p.moment = double(kept[Saved::moment_p]);
    q.moment = double(kept[Saved::moment_q]);
    p.centre = double(kept[Saved::centre_p]);
    q.centre = double(kept[Saved::centre_q]);
    p.deviation = double(kept[Saved::deviation_p]);
    q.deviation = double(kept[Saved::deviation_q]);
    p.count = double(kept[Saved::count_p]);
    q.count = double(kept[Saved::count_q]);
  }
  p.set_slope(temperature, standardize);
  q.set_slope(temperature, standardize);
  if (grad_temperatures && first == 0) grad_temperatures[row] = T(-factor * (p.moment + q.moment) / temperature);
  if (!grad_x.data && !grad_y.data) return;

  const DivergenceConstants<T> c(p, q, top, beta);
  const T factor_p = T(factor * p.slope * (is_jsd ? beta : 1)), mean_p = T(p.ratio), centre_p = T(p.centre);
  const T factor_q = T(factor * q.slope * (is_jsd ? 1 - beta : 1)), mean_q = T(q.ratio), centre_q = T(q.centre);
  const T spread_p = spread_of(p, factor, standardize), spread_q = spread_of(q, factor, standardize);
  const T absent = -T(INFINITY);
  for (int64_t j = first; j < classes; j += step) {
    const T of_p = x[j], of_q = y[j];
    const DivergenceTerms<T> t = terms_of<T, is_jsd>(c, of_p, of_q);
    if (grad_x.data) {
      const T spread = of_p == absent ? T(0) : spread_p * (of_p - centre_p);
      out_x.set(j, factor_p * t.p * ((is_jsd ? t.u : t.r) - mean_p) - spread);
    }
    if (grad_y.data) {
      const T spread = of_q == absent ? T(0) : spread_q * (of_q - centre_q);
      out_y.set(j, factor_q * (is_jsd ? t.q * (t.v - mean_q) : t.gradient_q) - spread);
    }
  }
}

}  // namespace kdkernels
