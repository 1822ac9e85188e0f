// Inter-class correlation: the row softmax of z zᵀ, averaged over the samples into a map, and the divergence of two maps.
//
// The kernel works on a few rows of the map at a time. It computes their exponentials for every sample and adds them up. The
// derivative of the loss with respect to the summed rows is applied to every sample's logits through the same exponentials. No
// memory of size K² or b·K² is held. Entries of the map near 0 lose their digits in float or vanish. For these, the kernel uses
// logarithms in double.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../checks/icc.h"
#include "icc_rows.h"
#include "log.h"
#include "parallel.h"

namespace kdkernels {
namespace {

using namespace icc;

constexpr int64_t kElementsPerThread = 32768;
constexpr int64_t kKeptBytes = 1 << 20;  // exponentials kept for the gradient: what an L2 cache holds

// Entries of the student's map below kLost have lost digits. This matters if the teacher's entry is not below kFaint. Such an
// entry is called cold.
template <typename T>
constexpr T kLost = std::is_same_v<T, float> ? T(0x1p-80) : T(0x1p-900);
template <typename T>
constexpr T kFaint = std::is_same_v<T, float> ? T(0x1p-60) : T(0x1p-200);

template <typename T>
struct Networks {
  Logits<T> student, teacher;

  bool finite(int64_t s) const { return student.finite(s) && teacher.finite(s); }
  bool finite() const { return student.finite() && teacher.finite(); }
};

// The scratch memory of a thread.
template <typename T>
struct Room {
  Correlations<T> student, teacher;
  T *row_student, *row_teacher;  // kMostRows x stride

  // With `one_by_one`, only the exponentials of one sample are kept.
  static Room of_this_thread(const Logits<T>& logits, bool one_by_one, bool want_student, bool want_teacher) {
    const int64_t batch = logits.batch, rows = kMostRows * logits.stride;
    const bool fits = (want_student + want_teacher) * batch * rows * int64_t(sizeof(T)) <= kKeptBytes;
    const bool keep_student = fits && want_student && !one_by_one, keep_teacher = fits && want_teacher && !one_by_one;
    const int64_t of_groups = logits.groups * Vec<T>::size * logits.classes;
    const int64_t size_student = of_groups ? of_groups : (keep_student ? batch : kSamples) * rows,
                  size_teacher = of_groups ? of_groups : (keep_teacher ? batch : kSamples) * rows;
    const int64_t sums_size = kMostRows * Logits<T>::padded(batch);
    T* memory = workspace<T, Scratch::correlations>(size_student + size_teacher + 2 * rows + 2 * sums_size);
    T* row_student = memory + size_student + size_teacher;
    T* sums = row_student + 2 * rows;
    return {{memory, sums, keep_student},
            {memory + size_student, sums + sums_size, keep_teacher},
            row_student,
            row_student + rows};
  }
};

// The divergence of some rows of two maps, and its gradients.
template <typename T, typename MapRows>
class MapComparison {
 public:
  MapComparison(const Networks<T>& logits, int64_t first, const Room<T>& memory)
      : student_{logits.student, first, memory.student},
        teacher_{logits.teacher, first, memory.teacher},
        map_student_(memory.row_student),
        map_teacher_(memory.row_teacher),
        colds_{logits.student.batch} {}

  double run(T* grad_student, T* grad_teacher) {
    student_.add_up(map_student_);
    teacher_.add_up(map_teacher_);
    double loss = 0;
    for (int r = 0; r < MapRows::count; ++r) loss += compare(r);
    if (grad_student) student_.pull_back(map_student_, colds_, grad_student);
    if (grad_teacher) teacher_.pull_back(map_teacher_, {student_.logits.batch}, grad_teacher);
    return loss;
  }

 private:
  using V = typename Vec<T>::type;

  // The placeholder for the derivative of a cold entry, whose exponentials are divided by it. It is so large that the mean does
  // not change the difference.
  static constexpr T kColdDerivative = T(0x1p60);

  // KL(t, s) as the sum of t log(t / s) - t + s: with x = s / t each term is t (x - 1 - log x) >= 0. So a small divergence is
  // as precise as a large one. Replaces both rows by the negative derivatives.
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

  // t log(t / s) for an s that is too small for float. Its logarithm comes from the logarithms of its summands in double.
  double compare_cold(int r, const T* row_s, T* row_t) {
    const Logits<T>& logits = student_.logits;
    const int64_t batch = logits.batch;
    std::vector<double> sums(batch), log_sums(batch), powers(batch);
    for (int64_t s = 0; s < batch; ++s) {
      sums[s] = 1 / double(student_.memory.inverse_sums[s * MapRows::count + r]);
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
      // The responsibility of each sample for the entry, multiplied by b t.
      const double factor = batch * t / (sum * double(kColdDerivative));
      colds_.positions.push_back(r * logits.stride + j);
      for (int64_t s = 0; s < batch; ++s) colds_.exponentials.push_back(T(powers[s] * factor * sums[s]));
    }
    return loss;
  }

  MapRows student_, teacher_;
  T *map_student_, *map_teacher_;
  Colds<T> colds_;
};

// Return the log of the sum of a row's exponentials. `inverse` is 1 / sum. The largest exponential is 1. If it is nearly the
// whole sum, the other exponentials are added up separately, because only they distinguish such rows.
template <typename T>
T log_of_sum(const T* e, int64_t stride, T inverse) {
  using V = typename Vec<T>::type;
  if (!(inverse > T(2) / T(3))) return -std::log(inverse);
  V others = {};
  for (int64_t j = 0; j < stride; j += Vec<T>::size) {
    const V values = load<T>(e + j);
    others += values < T(1) ? values : V{};
  }
  return std::log1p(sum_of<T>(others));
}

// The divergence of R rows of every sample's own P.
template <typename T, int R>
class SampleComparison {
 public:
  SampleComparison(const Networks<T>& logits, int64_t first, const Room<T>& memory)
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

  // KL(p, q) as in kd.cpp. With d = log(p / q), each term is p (exp(-d) - 1 + d) >= 0, and q - p is p (exp(-d) - 1).
  double compare(const Products<T, R>& student, const Products<T, R>& teacher, T* grad_student, T* grad_teacher) {
    T *q_row = memory_.student.exponentials, *p_row = memory_.teacher.exponentials, *derivative = memory_.row_teacher;
    T inverse_q[R], inverse_p[R], ones[R];
    student.exponentials(q_row, stride_, inverse_q);
    teacher.exponentials(p_row, stride_, inverse_p);
    const auto below_s = student.below_max(), below_t = teacher.below_max();
    V losses[R] = {}, log_sums[R];
    for (int r = 0; r < R; ++r) {
      log_sums[r] = V{} + (log_of_sum(q_row + r * stride_, stride_, inverse_q[r]) -
                           log_of_sum(p_row + r * stride_, stride_, inverse_p[r]));
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

  const Networks<T>& logits_;
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

// One gradient of the logits per thread: the sum over the rows of A that this thread has processed.
template <typename T>
class PartialGradients {
 public:
  PartialGradients(T* memory, const Logits<T>& logits, int64_t count)
      : memory_(memory), size_(size(logits, 1)), count_(count) {}

  static int64_t size(const Logits<T>& logits, int64_t count) {
    const int64_t of_groups = logits.groups * Vec<T>::size * logits.classes;
    return count * (of_groups ? of_groups : logits.batch * logits.stride);
  }

  // Return the gradient of a thread, which the thread sets to zero.
  T* begin(int64_t block) const {
    std::fill(memory_ + block * size_, memory_ + (block + 1) * size_, T(0));
    return memory_ + block * size_;
  }

  // Return `scale` times their sum, in a fixed order.
  Tensor sum(const Tensor& like, const Logits<T>& logits, T scale) const {
    const Tensor total = new_compact(like, {logits.batch, logits.classes}, kScalarType<T>);
    T* out = total.mutable_data_ptr<T>();
    if (logits.groups) {
      constexpr int64_t lanes = Vec<T>::size;
      for (int64_t g = 0; g < logits.groups; ++g)
        for (int64_t j = 0; j < logits.classes; ++j) {
          const auto value = sum_at((g * logits.classes + j) * lanes) * scale;
          for (int64_t s = g * lanes; s < std::min(logits.batch, (g + 1) * lanes); ++s)
            out[s * logits.classes + j] = value[s - g * lanes];
        }
    } else {
      for (int64_t s = 0; s < logits.batch; ++s)
        for_vectors<T>(0, logits.classes, [&](int64_t j, int64_t count) {
          store_first<T>(out + s * logits.classes + j, sum_at(s * logits.stride + j) * scale, count);
        });
    }
    return total;
  }

 private:
  typename Vec<T>::type sum_at(int64_t place) const {
    auto value = load<T>(memory_ + place);
    for (int64_t block = 1; block < count_; ++block) value += load<T>(memory_ + place + block * size_);
    return value;
  }

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
  const int64_t batch = student.size(0), classes = student.size(1);
  const bool grouped = !per_sample && Logits<T>::suits_groups(batch, classes);
  const Networks<T> logits{
      {student, workspace<T, Scratch::student_logits>(Logits<T>::size(student, grouped)), grouped},
      {teacher, workspace<T, Scratch::teacher_logits>(Logits<T>::size(teacher, grouped)), grouped}};
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
      const Room<T> room = Room<T>::of_this_thread(logits.student, per_sample, want_student, want_teacher);
      T* grad_student = want_student ? of_student.begin(block) : nullptr;
      T* grad_teacher = want_teacher ? of_teacher.begin(block) : nullptr;
      double sum = 0;  // local, because threads that write to `losses` would share its cache lines
      const auto compare = [&](auto&& rows) { sum += rows.run(grad_student, grad_teacher); };
      if (grouped)
        for (int64_t first = begin; first < end; ++first)
          compare(MapComparison<T, GroupedMapRow<T>>(logits, first, room));
      else
        for_rows(begin, end, [&](auto count, int64_t first) {
          constexpr int R = decltype(count)::value;
          if (per_sample)
            compare(SampleComparison<T, R>(logits, first, room));
          else
            compare(MapComparison<T, MapRows<T, R>>(logits, first, room));
        });
      losses[block] = sum;
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
    const Room<T> room = Room<T>::of_this_thread(logits, true, false, false);
    for_rows(begin, end, [&](auto count, int64_t first) {
      constexpr int R = decltype(count)::value;
      MapRows<T, R>{logits, first, room.student}.add_up(room.row_student);
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
      const Room<T> room = Room<T>::of_this_thread(logits, true, false, false);
      T* grad = partial.begin(block);
      for_rows(begin, end, [&](auto count, int64_t first) {
        constexpr int R = decltype(count)::value;
        std::fill(room.row_student, room.row_student + R * stride, T(0));
        for (int r = 0; r < R; ++r)
          for (int64_t j = 0; j < classes; ++j)
            room.row_student[r * stride + j] = -derivative[(first + r) * row + j * column];
        MapRows<T, R>{logits, first, room.student}.pull_back(room.row_student, {batch}, grad);
      });
    });
  }
  const Tensor grad = partial.sum(tensor, logits, T(1) / T(batch));
  if (!finite) fill_nan<T>(grad, 0, batch * classes);
  return grad;
}

}  // namespace

Tensor icc_map(const Tensor& logits) {
  check_icc_map(logits);
  return with_compute_type(logits, [&](auto type) { return run_map<decltype(type)>(logits); });
}

Tensor icc_map_backward(const Tensor& grad_map, const Tensor& logits) {
  check_icc_map_backward(grad_map, logits);
  return with_compute_type(logits, [&](auto type) { return run_map_backward<decltype(type)>(grad_map, logits); });
}

std::tuple<Tensor, Tensor, Tensor> icc_loss(const Tensor& student, const Tensor& teacher, bool per_sample, double scale,
                                            bool grad_student, bool grad_teacher) {
  check_icc_loss(student, teacher, scale);
  const bool in_double = student.scalar_type() == ScalarType::Double || teacher.scalar_type() == ScalarType::Double;
  return (in_double ? run<double> : run<float>)(student, teacher, per_sample, scale, grad_student, grad_teacher);
}

}  // namespace kdkernels

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def("icc_map(Tensor logits) -> Tensor");
  m.def("icc_map_backward(Tensor grad_map, Tensor logits) -> Tensor");
  // scale times the KL of the K x K maps, or the mean KL of every sample's own map.
  m.def(
      "icc_loss(Tensor student, Tensor teacher, bool per_sample, float scale, bool grad_student, bool grad_teacher)"
      " -> (Tensor loss, Tensor grad_student, Tensor grad_teacher)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("icc_map", TORCH_BOX(&kdkernels::icc_map));
  m.impl("icc_map_backward", TORCH_BOX(&kdkernels::icc_map_backward));
  m.impl("icc_loss", TORCH_BOX(&kdkernels::icc_loss));
}
