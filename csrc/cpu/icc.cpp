// Inter-class correlation: row softmaxes of every sample's z zᵀ, averaged into a map, and the divergence of two maps.
//
// Work goes by a few rows of the map at a time. Their exponentials are computed for every sample and added up; what the loss
// says of the summed rows is then pulled back to every sample's logits through the same exponentials. Nothing of size K² or
// b·K² is held. Near 0, where float entries of the map lose their digits or vanish, logarithms in double take over.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "exp.h"
#include "log.h"
#include "operators.h"
#include "parallel.h"
#include "tensors.h"
#include "workspace.h"

namespace kdkernels {
namespace {

constexpr int64_t kElementsPerThread = 32768;
constexpr int64_t kBlock = 1024;  // terms added up before their sum is added to others
constexpr int64_t kKeptBytes =
    1 << 20;  // exponentials that are kept for the gradient, not computed again: what a cache holds
constexpr int kMostRows = 4;
constexpr int64_t kSamples = 8;

// Entries of the student's map below kLost have lost digits, which matters where the teacher's are not below kFaint: such an
// entry is called cold.
template <typename T>
constexpr T kLost = std::is_same_v<T, float> ? T(0x1p-80) : T(0x1p-900);
template <typename T>
constexpr T kFaint = std::is_same_v<T, float> ? T(0x1p-60) : T(0x1p-200);

template <typename T>
T sum_of(typename Vec<T>::type lanes) {
  using V = typename Vec<T>::type;
  return reduce<T>(lanes, [](V a, V b) { return a + b; });
}

// Each of `a` and `b` folded in two: the sums of `a` come to lie in the lanes without the bit `step`, those of `b` with it.
template <typename T, int64_t step>
typename Vec<T>::type fold(typename Vec<T>::type a, typename Vec<T>::type b) {
  vec_detail::exchange<step>(a, b, std::make_integer_sequence<int64_t, Vec<T>::size>());
  return a + b;
}

// The sums over the lanes of R vectors, all at once.
template <typename T, int R>
[[gnu::always_inline]] inline void sums_of(const typename Vec<T>::type* rows, T* out) {
  if constexpr (R == 1 || R > Vec<T>::size) {
    for (int r = 0; r < R; ++r) out[r] = sum_of<T>(rows[r]);
  } else {
    auto sums = fold<T, 1>(rows[0], rows[1]);
    if constexpr (R == 4) sums = fold<T, 2>(sums, fold<T, 1>(rows[2], rows[3]));
    for (Integer<T> step = R; step < Vec<T>::size; step *= 2) sums += __builtin_shuffle(sums, lane_numbers<T>() ^ step);
    for (int r = 0; r < R; ++r) out[r] = sums[r];
  }
}

// One network's logits as numbers of the compute type, a row per sample, with zeros behind the last class.
template <typename T>
class Logits {
  using V = typename Vec<T>::type;

 public:
  int64_t batch, classes, stride;

  Logits(const Tensor& tensor, T* memory)
      : batch(tensor.size(0)),
        classes(tensor.size(1)),
        stride(padded(classes)),
        numbers_(memory),
        smallest_(batch),
        largest_(batch) {
    with_element_type(tensor, [&](auto element) {
      read(static_cast<const decltype(element)*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1));
    });
  }

  static int64_t padded(int64_t classes) { return round_up(classes, Vec<T>::size); }
  static int64_t size(const Tensor& tensor) { return tensor.size(0) * padded(tensor.size(1)); }

  const T* sample(int64_t s) const { return numbers_ + s * stride; }
  // The class whose logit has the largest product with z.
  int64_t partner(int64_t s, T z) const { return z >= 0 ? largest_[s] : smallest_[s]; }
  bool finite(int64_t s) const { return smallest_[s] >= 0; }
  bool finite() const {
    for (int64_t s = 0; s < batch; ++s)
      if (!finite(s)) return false;
    return true;
  }

 private:
  template <typename Element>
  void read(const Element* source, int64_t row, int64_t column) {
    for (int64_t s = 0; s < batch; ++s) {
      T* out = numbers_ + s * stride;
      const Element* elements = source + s * row;
      if (column == 1)
        for (int64_t j = 0; j < classes; ++j) out[j] = static_cast<T>(elements[j]);
      else
        for (int64_t j = 0; j < classes; ++j) out[j] = static_cast<T>(elements[j * column]);
      V smallest = V{} + out[0], largest = smallest, nan{};
      for_vectors<T>(0, classes, [&](int64_t j, int64_t count) {
        const V z = load_first<T>(out + j, count, out[0]);
        smallest = lesser(smallest, z);
        largest = greater(largest, z);
        nan += z * T(0);
      });
      std::fill(out + classes, out + stride, T(0));
      const bool finite = sum_of<T>(nan) == 0;
      smallest_[s] = finite ? std::find(out, out + classes, reduce<T>(smallest, lesser)) - out : -1;
      largest_[s] = finite ? std::find(out, out + classes, reduce<T>(largest, greater)) - out : -1;
    }
  }

  static V lesser(V a, V b) { return a < b ? a : b; }
  static V greater(V a, V b) { return a > b ? a : b; }

  T* numbers_;
  std::vector<int64_t> smallest_, largest_;  // classes, -1 where not all logits are finite
};

// A - max A of a row z_i z of A, by the difference of the logits: products of confident logits are in the hundreds, and were
// they rounded first, the difference would be lost; of the largest logits it would overflow.
template <typename T>
struct BelowMax {
  using V = typename Vec<T>::type;

  V factor, partner;

  BelowMax(T z_i, T partner) : factor(V{} + z_i), partner(V{} + partner) {}
  V operator()(V z_j) const { return (z_j - partner) * factor; }
  double exactly(T z_j) const { return (double(z_j) - partner[0]) * factor[0]; }
};

// R rows of one sample's A = z zᵀ.
template <typename T, int R>
struct Products {
  using V = typename Vec<T>::type;

  const T* z;
  int64_t classes;
  T factor[R];
  int64_t top[R];  // the class whose logit's product with the factor is largest

  Products(const Logits<T>& logits, int64_t s, int64_t first) : z(logits.sample(s)), classes(logits.classes) {
    for (int r = 0; r < R; ++r) {
      factor[r] = classes == 1 ? T(0) : z[first + r];  // the softmax of one number is exactly 1
      top[r] = logits.partner(s, factor[r]);
    }
  }

  BelowMax<T> below_max(int r) const { return {factor[r], z[top[r]]}; }
  std::array<BelowMax<T>, R> below_max() const { return below_max(std::make_integer_sequence<int, R>()); }

  // exp(A - max A) in rows of `stride`, zeros behind the last class, and one over their sums.
  [[gnu::always_inline]] void exponentials(T* out, int64_t stride, T* inverse_sums) const {
    const auto below = below_max();
    V sums[R] = {};
    int64_t j = 0;
    while (j + Vec<T>::size <= classes) {
      V block[R] = {};
      for (const int64_t end = std::min(classes, j + kBlock); j + Vec<T>::size <= end; j += Vec<T>::size) {
        const V z_j = load<T>(z + j);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const V e = exp_floored<T>(below[r](z_j));
          store<T>(out + r * stride + j, e);
          block[r] += e;
        }
      }
      for (int r = 0; r < R; ++r) sums[r] += block[r];
    }
    if (j < classes) {
      const auto inside = first_lanes<T>(classes - j);
      const V z_j = load<T>(z + j);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const V e = inside ? exp_floored<T>(below[r](z_j)) : V{};
        store<T>(out + r * stride + j, e);
        sums[r] += e;
      }
    }
    T totals[R];
    sums_of<T, R>(sums, totals);
    for (int r = 0; r < R; ++r) inverse_sums[r] = 1 / totals[r];
  }

  // Adds to the sample's gradient what dA gives: z_r dA_r to all logits, and dA_r · z to logit r. dA(j, r) comes without
  // its factor scales[r].
  template <typename F>
  [[gnu::always_inline]] void spread(int64_t first, int64_t stride, const T* scales, T* grad,
                                     const F& d_products) const {
    V rows[R] = {}, factors[R];
    for (int r = 0; r < R; ++r) factors[r] = V{} + factor[r] * scales[r];
    for (int64_t begin = 0; begin < stride; begin += kBlock) {
      V block[R] = {};
      for (int64_t j = begin; j < std::min(stride, begin + kBlock); j += Vec<T>::size) {
        const V z_j = load<T>(z + j);
        V column = load<T>(grad + j);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const V d = d_products(j, r);
          column += d * factors[r];
          block[r] += d * z_j;
        }
        store<T>(grad + j, column);
      }
      for (int r = 0; r < R; ++r) rows[r] += block[r];
    }
    T totals[R];
    sums_of<T, R>(rows, totals);
    for (int r = 0; r < R; ++r) grad[first + r] += totals[r] * scales[r];
  }

  // Given the exponentials and -dL/dP, the sample's gradient is dA = P (mean - (negative - top)) with `top` the largest
  // entry's `negative`, so that nothing cancels where that entry is nearly 1, and mean = P · (negative - top).
  [[gnu::always_inline]] void means(int64_t stride, const T* e, const T* inverse, const T* negative, V* out) const {
    V dots[R] = {}, tops[R];
    for (int r = 0; r < R; ++r) tops[r] = V{} + negative[r * stride + top[r]];
    for (int64_t begin = 0; begin < stride; begin += kBlock) {
      V block[R] = {};
      for (int64_t j = begin; j < std::min(stride, begin + kBlock); j += Vec<T>::size)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const int64_t at = r * stride + j;
          block[r] += load<T>(e + at) * (load<T>(negative + at) - tops[r]);
        }
      for (int r = 0; r < R; ++r) dots[r] += block[r];
    }
    T totals[R];
    sums_of<T, R>(dots, totals);
    for (int r = 0; r < R; ++r) out[r] = V{} + totals[r] * inverse[r];
  }

  void pull_back(int64_t first, int64_t stride, const T* e, const T* inverse, const T* negative, const V* means,
                 T* grad) const {
    V mean[R], tops[R];
    for (int r = 0; r < R; ++r) {
      mean[r] = means[r];
      tops[r] = V{} + negative[r * stride + top[r]];
    }
    spread(first, stride, inverse, grad, [&](int64_t j, int r) {
      const int64_t at = r * stride + j;
      return load<T>(e + at) * (mean[r] - (load<T>(negative + at) - tops[r]));
    });
  }

 private:
  template <int... r>
  std::array<BelowMax<T>, R> below_max(std::integer_sequence<int, r...>) const {
    return {below_max(r)...};
  }
};

// The exponentials of R rows of one network: of all samples or, where those would not stay in the cache, of a few.
template <typename T>
struct Correlations {
  T* exponentials;
  T* inverse_sums;  // batch x R
  bool kept;

  T* of(int64_t s, int R, int64_t stride) const { return exponentials + (kept ? s : s % kSamples) * R * stride; }
};

// Entries of the student's map that float cannot hold, with the exponentials that stand for each in every sample.
template <typename T>
struct Colds {
  int64_t batch;
  std::vector<int64_t> positions = {};  // in the R rows
  std::vector<T> exponentials = {};     // batch of them for each

  void put(int64_t s, T* rows) const {
    for (size_t i = 0; i < positions.size(); ++i) rows[positions[i]] = exponentials[i * batch + s];
  }
};

template <typename T, int R>
struct Rows {
  using V = typename Vec<T>::type;

  const Logits<T>& logits;
  int64_t first;
  Correlations<T> memory;

  // Rows [first, first + R) of the map, times b.
  void add_up(T* map) const {
    const int64_t stride = logits.stride;
    std::fill(map, map + R * stride, T(0));
    for_samples([&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s)
        Products<T, R>(logits, s, first).exponentials(memory.of(s, R, stride), stride, memory.inverse_sums + s * R);
      for (int r = 0; r < R; ++r)
        for (int64_t j = 0; j < stride; j += Vec<T>::size) {
          T* entry = map + r * stride + j;
          const T* e = memory.of(begin, R, stride) + r * stride + j;
          V sum = load<T>(entry);
          for (int64_t s = begin; s < end; ++s, e += R * stride) sum += load<T>(e) * memory.inverse_sums[s * R + r];
          store<T>(entry, sum);
        }
    });
  }

  // Given -dL/dP, R rows, the same for all samples, adds up the gradients of all samples.
  void pull_back(const T* negative, const Colds<T>& colds, T* grad) const {
    const int64_t stride = logits.stride;
    for_samples([&](int64_t begin, int64_t end) {
      V means[kSamples][R];
      for (int64_t s = begin; s < end; ++s) {
        const Products<T, R> products(logits, s, first);
        T* e = memory.of(s, R, stride);
        if (!memory.kept) products.exponentials(e, stride, memory.inverse_sums + s * R);
        colds.put(s, e);
        products.means(stride, e, memory.inverse_sums + s * R, negative, means[s - begin]);
      }
      for (int64_t s = begin; s < end; ++s)
        Products<T, R>(logits, s, first)
            .pull_back(first, stride, memory.of(s, R, stride), memory.inverse_sums + s * R, negative, means[s - begin],
                       grad + s * stride);
    });
  }

 private:
  // A few samples at a time: one's sums take long to be ready, and the others need not wait for them.
  template <typename F>
  void for_samples(const F& f) const {
    for (int64_t begin = 0; begin < logits.batch; begin += kSamples) f(begin, std::min(begin + kSamples, logits.batch));
  }
};

template <typename T>
struct Pair {
  Logits<T> student, teacher;

  bool finite(int64_t s) const { return student.finite(s) && teacher.finite(s); }
  bool finite() const { return student.finite() && teacher.finite(); }
};

// What a thread works in.
template <typename T>
struct Room {
  Correlations<T> student, teacher;
  T *row_student, *row_teacher;  // kMostRows x stride

  // With `one_by_one` no exponentials are kept beyond their sample.
  static Room of_this_thread(int64_t batch, int64_t stride, bool one_by_one, bool want_student, bool want_teacher) {
    const int64_t rows = kMostRows * stride;
    const bool fits = (want_student + want_teacher) * batch * rows * int64_t(sizeof(T)) <= kKeptBytes;
    const bool keep_student = fits && want_student && !one_by_one, keep_teacher = fits && want_teacher && !one_by_one;
    const int64_t size_student = (keep_student ? batch : kSamples) * rows,
                  size_teacher = (keep_teacher ? batch : kSamples) * rows;
    T* memory = workspace<T, Scratch::correlations>(size_student + size_teacher + 2 * rows + 2 * kMostRows * batch);
    T* row_student = memory + size_student + size_teacher;
    T* sums = row_student + 2 * rows;
    return {{memory, sums, keep_student},
            {memory + size_student, sums + kMostRows * batch, keep_teacher},
            row_student,
            row_student + rows};
  }
};

// The divergence of R rows of two maps, and the gradients that come from them.
template <typename T, int R>
class MapComparison {
 public:
  MapComparison(const Pair<T>& logits, int64_t first, const Room<T>& memory)
      : student_{logits.student, first, memory.student},
        teacher_{logits.teacher, first, memory.teacher},
        map_student_(memory.row_student),
        map_teacher_(memory.row_teacher),
        colds_{logits.student.batch} {}

  double run(T* grad_student, T* grad_teacher) {
    student_.add_up(map_student_);
    teacher_.add_up(map_teacher_);
    double loss = 0;
    for (int r = 0; r < R; ++r) loss += compare(r);
    if (grad_student) student_.pull_back(map_student_, colds_, grad_student);
    if (grad_teacher) teacher_.pull_back(map_teacher_, {student_.logits.batch}, grad_teacher);
    return loss;
  }

 private:
  using V = typename Vec<T>::type;

  // Stands for the derivative of a cold entry, whose exponentials are divided by it: so large that beside it the mean does
  // not count, as it must not.
  static constexpr T kColdDerivative = T(0x1p60);

  // KL(t, s) as the sum of t log(t / s) - t + s: with x = s / t each term is t (x - 1 - log x) >= 0, so that a small
  // divergence is as precise as a large one. Replaces both rows by minus the derivatives.
  double compare(int r) {
    const Logits<T>& logits = student_.logits;
    const T average = T(1) / T(logits.batch);
    T* row_s = map_student_ + r * logits.stride;
    T* row_t = map_teacher_ + r * logits.stride;
    double loss = 0;
    Mask<T> any_cold{};
    for (int64_t begin = 0; begin < logits.classes; begin += kBlock) {
      V block{};
      for_vectors<T>(begin, std::min(begin + kBlock, logits.classes), [&](int64_t j, int64_t count) {
        const V s = load_first<T>(row_s + j, count, T(1)) * average;
        const V t = load_first<T>(row_t + j, count, T(1)) * average;
        const auto lost = s < kLost<T>, faint = t < kFaint<T>;
        const V one = V{} + T(1), zero{};
        const V over_s = one / (lost ? one : s), over_t = one / (faint ? one : t);
        const Logarithm<T> ratio = logarithm<T>((lost ? one : s) * over_t, (s - t) * over_t);
        block += (lost | faint) ? s - t : t * ratio.remainder;
        store_first<T>(row_s + j, lost ? (faint ? zero : zero + kColdDerivative) : (t - s) * over_s, count);
        store_first<T>(row_t + j, faint ? zero : (lost ? t : ratio.log), count);
        any_cold |= lost & ~faint;
      });
      loss += sum_of<T>(block);
    }
    bool cold = false;
    for (int64_t lane = 0; lane < Vec<T>::size; ++lane) cold |= any_cold[lane] != 0;
    return cold ? loss + compare_cold(r, row_s, row_t) : loss;
  }

  // t log(t / s) where s is so small that only its logarithm, from those of its summands in double, can be told.
  double compare_cold(int r, const T* row_s, T* row_t) {
    const Logits<T>& logits = student_.logits;
    const int64_t batch = logits.batch;
    std::vector<double> sums(batch), log_sums(batch), powers(batch);
    for (int64_t s = 0; s < batch; ++s) {
      sums[s] = 1 / double(student_.memory.inverse_sums[s * R + r]);
      log_sums[s] = std::log(sums[s]);
    }
    double loss = 0;
    for (int64_t j = 0; j < logits.classes; ++j) {
      if (row_s[j] != kColdDerivative) continue;
      double largest = -std::numeric_limits<double>::infinity();
      for (int64_t s = 0; s < batch; ++s) {
        const Products<T, 1> row(logits, s, student_.first + r);
        powers[s] = row.below_max(0).exactly(row.z[j]) - log_sums[s];
        largest = std::max(largest, powers[s]);
      }
      typename Vec<double>::type total{};
      for_vectors<double>(0, batch, [&](int64_t s, int64_t count) {
        const auto below = load_first<double>(&powers[s], count, largest) - largest;
        const auto power = first_lanes<double>(count) ? exp_nonpositive<double>(below) : decltype(below){};
        store_first<double>(&powers[s], power, count);
        total += power;
      });
      const double sum = sum_of<double>(total), t = row_t[j], log_ratio = std::log(t * batch / sum) - largest;
      loss += t * log_ratio;
      row_t[j] = T(-log_ratio);
      // The responsibility of each sample for the entry, times b t.
      const double factor = batch * t / (sum * double(kColdDerivative));
      colds_.positions.push_back(r * logits.stride + j);
      for (int64_t s = 0; s < batch; ++s) colds_.exponentials.push_back(T(powers[s] * factor * sums[s]));
    }
    return loss;
  }

  Rows<T, R> student_, teacher_;
  T *map_student_, *map_teacher_;
  Colds<T> colds_;
};

// The divergence of R rows of every sample's own correlations.
template <typename T, int R>
class SampleComparison {
 public:
  SampleComparison(const Pair<T>& logits, int64_t first, const Room<T>& memory)
      : logits_(logits), first_(first), memory_(memory), stride_(logits.student.stride) {}

  double run(T* grad_student, T* grad_teacher) {
    double loss = 0;
    for (int64_t s = 0; s < logits_.student.batch; ++s) {
      if (!logits_.finite(s)) continue;
      const auto gradient = [&](T* grad) { return grad ? grad + s * stride_ : nullptr; };
      loss += compare(Products<T, R>(logits_.student, s, first_), Products<T, R>(logits_.teacher, s, first_),
                      gradient(grad_student), gradient(grad_teacher));
    }
    return loss;
  }

 private:
  using V = typename Vec<T>::type;

  // KL(p, q) as in kd.cpp: with d = log(p / q) each term is p (exp(-d) - 1 + d) >= 0, and q - p is p (exp(-d) - 1).
  double compare(const Products<T, R>& student, const Products<T, R>& teacher, T* grad_student, T* grad_teacher) {
    T *q_row = memory_.student.exponentials, *p_row = memory_.teacher.exponentials, *derivative = memory_.row_teacher;
    T inverse_q[R], inverse_p[R], ones[R];
    student.exponentials(q_row, stride_, inverse_q);
    teacher.exponentials(p_row, stride_, inverse_p);
    const auto below_s = student.below_max(), below_t = teacher.below_max();
    V losses[R] = {}, log_sums[R];
    for (int r = 0; r < R; ++r) {
      log_sums[r] = V{} + std::log(inverse_p[r] / inverse_q[r]);
      ones[r] = 1;
    }
    for (int64_t begin = 0; begin < stride_; begin += kBlock) {
      V block[R] = {};
      for (int64_t j = begin; j < std::min(stride_, begin + kBlock); j += Vec<T>::size) {
        const V z_s = load<T>(student.z + j), z_t = load<T>(teacher.z + j);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const int64_t at = r * stride_ + j;
          const V p = load<T>(p_row + at) * inverse_p[r], q = load<T>(q_row + at) * inverse_q[r];
          const V d = below_t[r](z_t) - below_s[r](z_s) + log_sums[r], pd = p * d;
          const auto small = (d < T(0.5)) & (d > T(-0.5));
          const V term = small ? p * exp_remainder<T>(d) : pd - (p - q);
          block[r] += term;
          store<T>(q_row + at, small ? term - pd : q - p);
          store<T>(derivative + at, -d);
        }
      }
      for (int r = 0; r < R; ++r) losses[r] += block[r];
    }
    if (grad_student)
      student.spread(first_, stride_, ones, grad_student,
                     [&](int64_t j, int r) { return load<T>(q_row + r * stride_ + j); });
    if (grad_teacher) {
      V means[R];
      teacher.means(stride_, p_row, inverse_p, derivative, means);
      teacher.pull_back(first_, stride_, p_row, inverse_p, derivative, means, grad_teacher);
    }
    double loss = 0;
    for (int r = 0; r < R; ++r) loss += sum_of<T>(losses[r]);
    return loss;
  }

  const Pair<T>& logits_;
  int64_t first_;
  const Room<T>& memory_;
  int64_t stride_;
};

// Call f(integral constant R, first) for groups of at most kMostRows rows that cover [begin, end).
template <typename F>
void for_rows(int64_t begin, int64_t end, const F& f) {
  for (; begin + kMostRows <= end; begin += kMostRows) f(std::integral_constant<int, kMostRows>(), begin);
  for (; begin + 2 <= end; begin += 2) f(std::integral_constant<int, 2>(), begin);
  for (; begin < end; ++begin) f(std::integral_constant<int, 1>(), begin);
}

Blocks blocks_of(int64_t batch, int64_t classes) {
  return Blocks(classes, classes < 64 ? 1 : kMostRows, std::max<int64_t>(1, kElementsPerThread / (batch * classes)));
}

// The threads' gradients of one network's logits: sums over the rows of A that each has gone through.
template <typename T>
class PartialGradients {
 public:
  PartialGradients(T* memory, const Logits<T>& logits, int64_t count)
      : memory_(memory), size_(logits.batch * logits.stride), count_(count) {}

  static int64_t size(const Logits<T>& logits, int64_t count) { return count * logits.batch * logits.stride; }

  // The one of a thread, set to zero by it.
  T* begin(int64_t block) const {
    std::fill(memory_ + block * size_, memory_ + (block + 1) * size_, T(0));
    return memory_ + block * size_;
  }

  // Their sum in a fixed order, times `scale`.
  Tensor sum(const Tensor& like, const Logits<T>& logits, T scale) const {
    const Tensor total = new_compact(like, {logits.batch, logits.classes}, kScalarType<T>);
    T* out = total.mutable_data_ptr<T>();
    for (int64_t s = 0; s < logits.batch; ++s)
      for_vectors<T>(0, logits.classes, [&](int64_t j, int64_t count) {
        const T* part = memory_ + s * logits.stride + j;
        auto value = load<T>(part);
        for (int64_t block = 1; block < count_; ++block) value += load<T>(part + block * size_);
        store_first<T>(out + s * logits.classes + j, value * scale, count);
      });
    return total;
  }

 private:
  T* memory_;
  int64_t size_, count_;
};

template <typename T>
void fill_nan(const Tensor& tensor, int64_t begin, int64_t end) {
  T* out = tensor.mutable_data_ptr<T>();
  std::fill(out + begin, out + end, std::numeric_limits<T>::quiet_NaN());
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> run(const Tensor& student, const Tensor& teacher, bool per_sample, double scale,
                                       bool want_student, bool want_teacher) {
  const Pair<T> logits{{student, workspace<T, Scratch::student_logits>(Logits<T>::size(student))},
                       {teacher, workspace<T, Scratch::teacher_logits>(Logits<T>::size(teacher))}};
  const int64_t batch = logits.student.batch, classes = logits.student.classes, stride = logits.student.stride;
  const Blocks blocks = blocks_of(batch, classes);
  const int64_t partial = PartialGradients<T>::size(logits.student, blocks.count);
  T* memory = workspace<T, Scratch::partial_gradients>((want_student + want_teacher) * partial);
  const PartialGradients<T> of_student(memory, logits.student, blocks.count);
  const PartialGradients<T> of_teacher(memory + want_student * partial, logits.teacher, blocks.count);

  const bool finite = logits.finite();
  std::vector<double> losses(blocks.count);
  if (per_sample || finite) {
    blocks.parallel([&](int64_t block, int64_t begin, int64_t end) {
      const FlushDenormals flush;
      const Room<T> room = Room<T>::of_this_thread(batch, stride, per_sample, want_student, want_teacher);
      T* grad_student = want_student ? of_student.begin(block) : nullptr;
      T* grad_teacher = want_teacher ? of_teacher.begin(block) : nullptr;
      for_rows(begin, end, [&](auto count, int64_t first) {
        constexpr int R = decltype(count)::value;
        losses[block] += per_sample ? SampleComparison<T, R>(logits, first, room).run(grad_student, grad_teacher)
                                    : MapComparison<T, R>(logits, first, room).run(grad_student, grad_teacher);
      });
    });
  }

  double loss = 0;
  for (const double part : losses) loss += part;
  if (!finite) loss = std::numeric_limits<double>::quiet_NaN();
  const auto gradient = [&](bool wanted, const PartialGradients<T>& parts, const Logits<T>& of) {
    if (!wanted) return new_compact(student, {0}, kScalarType<T>);
    const Tensor sum = parts.sum(student, of, T(scale / batch));
    for (int64_t s = 0; s < batch; ++s)
      if (per_sample ? !logits.finite(s) : !finite) fill_nan<T>(sum, s * classes, (s + 1) * classes);
    return sum;
  };
  return {new_scalar<T>(student, loss * scale / (per_sample ? batch : 1)),
          gradient(want_student, of_student, logits.student), gradient(want_teacher, of_teacher, logits.teacher)};
}

template <typename T>
Tensor run_map(const Tensor& tensor) {
  const Logits<T> logits(tensor, workspace<T, Scratch::student_logits>(Logits<T>::size(tensor)));
  const int64_t classes = logits.classes, stride = logits.stride;
  const Tensor map = new_compact(tensor, {classes, classes}, kScalarType<T>);
  T* out = map.mutable_data_ptr<T>();
  if (!logits.finite()) {
    fill_nan<T>(map, 0, classes * classes);
    return map;
  }
  blocks_of(logits.batch, classes).parallel([&](int64_t, int64_t begin, int64_t end) {
    const FlushDenormals flush;
    const Room<T> room = Room<T>::of_this_thread(logits.batch, stride, true, false, false);
    for_rows(begin, end, [&](auto count, int64_t first) {
      constexpr int R = decltype(count)::value;
      Rows<T, R>{logits, first, room.student}.add_up(room.row_student);
      for (int r = 0; r < R; ++r)
        for (int64_t j = 0; j < classes; ++j)
          out[(first + r) * classes + j] = room.row_student[r * stride + j] / T(logits.batch);
    });
  });
  return map;
}

template <typename T>
Tensor run_map_backward(const Tensor& grad_map, const Tensor& tensor) {
  const Logits<T> logits(tensor, workspace<T, Scratch::student_logits>(Logits<T>::size(tensor)));
  const int64_t batch = logits.batch, classes = logits.classes, stride = logits.stride;
  const Blocks blocks = blocks_of(batch, classes);
  const PartialGradients<T> partial(
      workspace<T, Scratch::partial_gradients>(PartialGradients<T>::size(logits, blocks.count)), logits, blocks.count);
  const T* derivative = grad_map.const_data_ptr<T>();
  const int64_t row = grad_map.stride(0), column = grad_map.stride(1);
  const bool finite = logits.finite();
  if (finite) {
    blocks.parallel([&](int64_t block, int64_t begin, int64_t end) {
      const FlushDenormals flush;
      const Room<T> room = Room<T>::of_this_thread(batch, stride, true, false, false);
      T* grad = partial.begin(block);
      for_rows(begin, end, [&](auto count, int64_t first) {
        constexpr int R = decltype(count)::value;
        std::fill(room.row_student, room.row_student + R * stride, T(0));
        for (int r = 0; r < R; ++r)
          for (int64_t j = 0; j < classes; ++j)
            room.row_student[r * stride + j] = -derivative[(first + r) * row + j * column];
        Rows<T, R>{logits, first, room.student}.pull_back(room.row_student, {batch}, grad);
      });
    });
  }
  const Tensor grad = partial.sum(tensor, logits, T(1) / T(batch));
  if (!finite) fill_nan<T>(grad, 0, batch * classes);
  return grad;
}

}  // namespace

Tensor icc_map(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.numel() > 0, "icc_map: logits must be b x K and not empty");
  return with_compute_type(logits, [&](auto type) { return run_map<decltype(type)>(logits); });
}

Tensor icc_map_backward(const Tensor& grad_map, const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.numel() > 0 && grad_map.dim() == 2 &&
                      grad_map.size(0) == logits.size(1) && grad_map.size(1) == logits.size(1),
                  "icc_map_backward: logits must be b x K and not empty, grad_map K x K");
  return with_compute_type(logits, [&](auto type) { return run_map_backward<decltype(type)>(grad_map, logits); });
}

std::tuple<Tensor, Tensor, Tensor> icc_loss(const Tensor& student, const Tensor& teacher, bool per_sample, double scale,
                                            bool grad_student, bool grad_teacher) {
  STD_TORCH_CHECK(student.dim() == 2 && teacher.dim() == 2 && student.size(0) == teacher.size(0) &&
                      student.size(1) == teacher.size(1) && student.numel() > 0,
                  "icc_loss: student and teacher must be b x K, of one shape and not empty");
  const bool in_double = student.scalar_type() == ScalarType::Double || teacher.scalar_type() == ScalarType::Double;
  return (in_double ? run<double> : run<float>)(student, teacher, per_sample, scale, grad_student, grad_teacher);
}

}  // namespace kdkernels
