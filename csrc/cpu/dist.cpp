// DIST: Pearson's correlation of two networks' probabilities, in each row and in each column. The kernel holds the probabilities
// of the rows that count. It passes over them by rows, by columns, and by rows again for the gradients.
//
// 1 - r is half the squared distance of the two lines, centred and divided by their norms. So it is precise if r is nearly 1.
#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "../checks/dist.h"
#include "logit_rows.h"
#include "parallel.h"
#include "workspace.h"

namespace kdkernels {
namespace {

constexpr double kEps = 1e-8;  // is added to the product of two norms
constexpr int64_t kRows = 64;  // rows whose column sums are added in the compute type before they are added in double

// A class that is not there, in place of a probability.
template <typename T>
constexpr T kAbsent = T(-1);

template <typename T>
Mask<T> is_absent(typename Vec<T>::type probability) {
  return probability < T(-0.5);
}

// Pearson's correlation of a line of both networks, and its derivatives: of_both (p - mean) - of_student (q - mean) to q, and
// of_both (q - mean) - of_teacher (p - mean) to p.
struct Correlation {
  double difference = 1;  // 1 - r
  double of_both, of_student, of_teacher;

  // student, teacher: the squared norms of the centred lines. distance: the squared distance of the lines times their inverse
  // norms, which are rounded.
  Correlation(double student, double teacher, double inverse_s, double inverse_t, double distance) {
    const double norm_s = std::sqrt(student), norm_t = std::sqrt(teacher), norms = norm_s * norm_t, sum = norms + kEps;
    of_both = 1 / sum;
    of_student = of_teacher = 0;
    if (norms == 0) return;
    const double of_s = norm_s * inverse_s, of_t = norm_t * inverse_t;  // nearly 1
    distance = (distance - (of_s - of_t) * (of_s - of_t)) / (of_s * of_t);
    difference = (norms * distance / 2 + kEps) / sum;
    const double r = norms * (1 - distance / 2) / sum;
    of_student = r * norm_t / (norm_s * sum);
    of_teacher = r * norm_s / (norm_t * sum);
  }
};

// Its derivatives times the weight of the line.
template <typename T>
struct Slopes {
  T of_both, of_student, of_teacher;
};

// The rows of both networks that count.
template <typename T>
struct Probabilities {
  int64_t count, classes, stride;
  T *student, *teacher;  // [count][stride]; a class that is not there is kAbsent
  bool all_there = true;

  T* student_row(int64_t k) const { return student + k * stride; }
  T* teacher_row(int64_t k) const { return teacher + k * stride; }
};

// One row: its probabilities, the number of its classes, and its correlation.
template <typename T>
class Row {
  using V = typename Vec<T>::type;

 public:
  int64_t there;

  Row(const T* student, const T* teacher, int64_t classes, T inverse_temperature, T* q, T* p)
      : there(classes), classes_(classes), q_(q), p_(p) {
    const T max_s = max_of<T>(student, 0, classes, -kInfinity<T>),
            max_t = max_of<T>(teacher, 0, classes, -kInfinity<T>);
    const T exponent = T(kLog2e<double> * inverse_temperature);
    double sum_s = 0, sum_t = 0;
    Mask<T> absent{};
    for_blocks(0, classes, [&](int64_t begin, int64_t end) {
      V block_s{}, block_t{};
      for_vectors<T>(begin, end, [&](int64_t j, int64_t count) {
        const V s = load_first<T>(student + j, count, T(0)), t = load_first<T>(teacher + j, count, T(0));
        const auto valid = first_lanes<T>(count);
        const V e_s = valid ? exp2_or_zero<T>((s - max_s) * exponent) : V{};
        const V e_t = valid ? exp2_or_zero<T>((t - max_t) * exponent) : V{};
        absent += (s == -kInfinity<T>)&(t == -kInfinity<T>);
        store_first<T>(q + j, e_s, count);
        store_first<T>(p + j, e_t, count);
        block_s += e_s;
        block_t += e_t;
      });
      sum_s += lane_sum<T>(block_s);
      sum_t += lane_sum<T>(block_t);
    });
    for (int64_t lane = 0; lane < Vec<T>::size; ++lane) there += absent[lane];
    inverse_s_ = T(1 / sum_s);
    inverse_t_ = T(1 / sum_t);
    if (there < classes)
      for (int64_t j = 0; j < classes; ++j)
        if (student[j] == -kInfinity<T> && teacher[j] == -kInfinity<T>) q[j] = p[j] = kAbsent<T>;
  }

  Correlation correlate() { return there == classes_ ? correlate<false>() : correlate<true>(); }

 private:
  template <bool absences>
  Correlation correlate() {
    const T mean = T(1.0 / there);
    const auto divided = [&](T* row, T inverse, int64_t j, int64_t count) {
      const V value = load_first<T>(row + j, count, T(0)), result = value * inverse;
      if constexpr (absences) return is_absent<T>(value) ? value : result;
      return result;
    };
    const auto centred = [&](V value) {
      if constexpr (absences) return is_absent<T>(value) ? V{} : value - mean;
      return value - mean;
    };
    // In double, because a small difference of the norms and the distance determines the gradient of a large probability.
    WideSum<T> of_student, of_teacher, of_difference;
    for_vectors<T>(0, classes_, [&](int64_t j, int64_t count) {
      const V q = divided(q_, inverse_s_, j, count), p = divided(p_, inverse_t_, j, count);
      store_first<T>(q_ + j, q, count);
      store_first<T>(p_ + j, p, count);
      const auto valid = first_lanes<T>(count);
      const V a = valid ? centred(q) : V{}, b = valid ? centred(p) : V{};
      of_student.add(a * a);
      of_teacher.add(b * b);
    });
    const double student = of_student.total(), teacher = of_teacher.total();
    const T inverse_q = T(1 / std::sqrt(student)), inverse_p = T(1 / std::sqrt(teacher));
    for_vectors<T>(0, classes_, [&](int64_t j, int64_t count) {
      const V q = centred(load_first<T>(q_ + j, count, T(0))), p = centred(load_first<T>(p_ + j, count, T(0)));
      const V d = first_lanes<T>(count) ? q * inverse_q - p * inverse_p : V{};
      of_difference.add(d * d);
    });
    return {student, teacher, inverse_q, inverse_p, of_difference.total()};
  }

  int64_t classes_;
  T *q_, *p_;
  T inverse_s_, inverse_t_;
};

// The columns of both networks. Their numbers are taken relative to the first sample's, so that equal samples differ by exactly 0.
template <typename T>
class Columns {
  using V = typename Vec<T>::type;

 public:
  std::vector<Slopes<T>> slopes;
  std::vector<T> shift_student, shift_teacher, mean_student, mean_teacher;
  std::vector<double> differences;
  std::vector<int64_t> there;  // samples that have the class

  explicit Columns(const Probabilities<T>& of)
      : shift_student(of.classes),
        shift_teacher(of.classes),
        mean_student(of.classes),
        mean_teacher(of.classes),
        differences(of.classes),
        there(of.classes, of.count),
        of_(of),
        correlations_(of.classes, Correlation(0, 0, 0, 0, 0)) {
    const int64_t grain = std::max<int64_t>(1, kLogitsPerThread / of.count);
    parallel_blocks(of.classes, kWidth, grain, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; j += kWidth)
        of.all_there ? correlate<false>(j, std::min(kWidth, end - j)) : correlate<true>(j, std::min(kWidth, end - j));
    });
  }

  // Return the mean of 1 - r over the columns that are not empty. Slopes are multiplied by `weight` and divided by their number.
  double mean(double weight) {
    int64_t lines = 0;
    double total = 0;
    for (int64_t j = 0; j < of_.classes; ++j)
      if (there[j] > 0) {
        ++lines;
        total += differences[j];
      }
    const double factor = weight / std::max<int64_t>(lines, 1);
    slopes.reserve(of_.classes);
    for (const Correlation& r : correlations_)
      slopes.push_back({T(factor * r.of_both), T(factor * r.of_student), T(factor * r.of_teacher)});
    return total / std::max<int64_t>(lines, 1);
  }

 private:
  static constexpr int kVectors = 2;
  static constexpr int64_t kWidth = kVectors * Vec<T>::size;

  template <bool absences>
  void correlate(int64_t first, int64_t width) {
    double counts[kWidth], sums[2][kWidth] = {}, norms[2][kWidth] = {}, distances[kWidth] = {};
    T shifts[2][kWidth], means[2][kWidth], inverses[2][kWidth];
    std::fill_n(counts, kWidth, double(of_.count));
    std::copy_n(of_.student + first, width, shifts[0]);
    std::copy_n(of_.teacher + first, width, shifts[1]);
    std::fill_n(shifts[0] + width, kWidth - width, T(0));
    std::fill_n(shifts[1] + width, kWidth - width, T(0));
    if constexpr (absences) find_first(first, width, counts, shifts);

    for_rows<absences>(
        first, width, shifts,
        [&](int v, V q, V p, V* parts) {
          parts[v] += q;
          parts[kVectors + v] += p;
        },
        [&](int64_t lane, const T* parts) {
          sums[0][lane] += parts[lane];
          sums[1][lane] += parts[kWidth + lane];
        });
    for (int side = 0; side < 2; ++side)
      for (int64_t lane = 0; lane < kWidth; ++lane)
        means[side][lane] = T(sums[side][lane] / std::max(counts[lane], 1.0));
    const auto centred = [&](int side, int v, V value) { return value - load<T>(means[side] + v * Vec<T>::size); };
    for_centred<absences>(
        first, width, shifts, centred,
        [&](int v, V q, V p, V* parts) {
          parts[v] += q * q;
          parts[kVectors + v] += p * p;
        },
        [&](int64_t lane, const T* parts) {
          norms[0][lane] += parts[lane];
          norms[1][lane] += parts[kWidth + lane];
        });
    for (int side = 0; side < 2; ++side)
      for (int64_t lane = 0; lane < kWidth; ++lane) inverses[side][lane] = T(1 / std::sqrt(norms[side][lane]));
    for_centred<absences>(
        first, width, shifts, centred,
        [&](int v, V q, V p, V* parts) {
          const V d = q * load<T>(inverses[0] + v * Vec<T>::size) - p * load<T>(inverses[1] + v * Vec<T>::size);
          parts[v] += d * d;
        },
        [&](int64_t lane, const T* parts) { distances[lane] += parts[lane]; });

    for (int64_t lane = 0; lane < width; ++lane) {
      const int64_t j = first + lane;
      correlations_[j] =
          Correlation(norms[0][lane], norms[1][lane], inverses[0][lane], inverses[1][lane], distances[lane]);
      differences[j] = correlations_[j].difference;
      there[j] = int64_t(counts[lane]);
      shift_student[j] = shifts[0][lane];
      shift_teacher[j] = shifts[1][lane];
      mean_student[j] = means[0][lane];
      mean_teacher[j] = means[1][lane];
    }
  }

  // Call add(v, q, p, parts) for every row and vector v of the columns, with the numbers relative to the shifts, and
  // flush(lane, parts) after every kRows rows.
  template <bool absences, typename Add, typename Flush>
  [[gnu::always_inline]] void for_rows(int64_t first, int64_t width, const T (&shifts)[2][kWidth], const Add& add,
                                       const Flush& flush) const {
    const auto unchanged = [](int, int, V value) { return value; };
    for_centred<absences>(first, width, shifts, unchanged, add, flush);
  }

  template <bool absences, typename Centred, typename Add, typename Flush>
  [[gnu::always_inline]] void for_centred(int64_t first, int64_t width, const T (&shifts)[2][kWidth],
                                          const Centred& centred, const Add& add, const Flush& flush) const {
    constexpr int64_t lanes = Vec<T>::size;
    const V shift[2][kVectors] = {{load<T>(shifts[0]), load<T>(shifts[0] + lanes)},
                                  {load<T>(shifts[1]), load<T>(shifts[1] + lanes)}};
    for (int64_t begin = 0; begin < of_.count; begin += kRows) {
      V parts[2 * kVectors] = {};
      for (int64_t k = begin; k < std::min(begin + kRows, of_.count); ++k)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          const int64_t at = k * of_.stride + first + v * lanes;  // rows are padded to whole vectors
          const V q = load<T>(of_.student + at), p = load<T>(of_.teacher + at);
          V a = centred(0, v, q - shift[0][v]), b = centred(1, v, p - shift[1][v]);
          if constexpr (absences) {
            const auto gone = is_absent<T>(q);
            a = gone ? V{} : a;
            b = gone ? V{} : b;
          }
          add(v, a, b, parts);
        }
      T numbers[2 * kWidth];
      for (int i = 0; i < 2 * kVectors; ++i) store<T>(numbers + i * lanes, parts[i]);
      for (int64_t lane = 0; lane < width; ++lane) flush(lane, numbers);
    }
  }

  // The first sample of each column that has the class, and how many do.
  void find_first(int64_t first, int64_t width, double* counts, T (&shifts)[2][kWidth]) const {
    for (int64_t lane = 0; lane < width; ++lane) {
      counts[lane] = 0;
      for (int64_t k = of_.count - 1; k >= 0; --k) {
        const T q = of_.student_row(k)[first + lane];
        if (q < T(-0.5)) continue;
        ++counts[lane];
        shifts[0][lane] = q;
        shifts[1][lane] = of_.teacher_row(k)[first + lane];
      }
    }
  }

  const Probabilities<T>& of_;
  std::vector<Correlation> correlations_;
};

// Writes the gradient of one row to one network's logits. `own` are its probabilities, `other` the other network's.
template <typename T>
class RowGradient {
  using V = typename Vec<T>::type;

 public:
  const T *own, *other;
  int64_t classes;
  T mean, row_both, row_own, inverse_temperature;
  const T *shift_own, *shift_other, *mean_own, *mean_other, *column_both, *column_own;

  // The gradient to the probabilities is -w. Through the softmax it becomes own (mean of w - w), where w is taken relative to the
  // largest class, so that nothing cancels if its probability is nearly 1.
  void write(T* out) const {
    const T largest = max_of<T>(own, 0, classes, T(-1));
    const int64_t top = std::min(position_of(own, classes, largest), classes - 1);
    const T at_top = slope(top);
    const double total = sum_over<T>(0, classes, [&](int64_t j, int64_t count) {
      const V probability = load_first<T>(own + j, count, T(0));
      const V w = slopes(j, count) - at_top;
      store_first<T>(out + j, w, count);
      return is_absent<T>(probability) ? V{} : probability * w;
    });
    const T average = T(total);
    for_vectors<T>(0, classes, [&](int64_t j, int64_t count) {
      const V probability = load_first<T>(own + j, count, T(0)), w = load_first<T>(out + j, count, T(0));
      const V gradient = probability * (average - w) * inverse_temperature;
      store_first<T>(out + j, is_absent<T>(probability) ? V{} : gradient, count);
    });
  }

 private:
  V slopes(int64_t j, int64_t count) const {
    const auto at = [&](const T* row) { return load_first<T>(row + j, count, T(0)); };
    const V p = at(other), q = at(own);
    return row_both * (p - mean) - row_own * (q - mean) + at(column_both) * ((p - at(shift_other)) - at(mean_other)) -
           at(column_own) * ((q - at(shift_own)) - at(mean_own));
  }
  T slope(int64_t j) const { return slopes(j, 1)[0]; }
};

template <typename T>
std::tuple<Tensor, Tensor, Tensor> run(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask,
                                       double beta, double gamma, double temperature, bool grad_student,
                                       bool grad_teacher) {
  const int64_t rows = student.size(0), classes = student.size(1);
  std::vector<int64_t> counted;
  counted.reserve(rows);
  const bool* counts = mask ? mask->const_data_ptr<bool>() : nullptr;
  for (int64_t i = 0; i < rows; ++i)
    if (!counts || counts[i * mask->stride(0)]) counted.push_back(i);
  const int64_t count = int64_t(counted.size());

  const auto gradient = [&](bool wanted) {
    return new_compact(student, wanted ? std::vector<int64_t>{rows, classes} : std::vector<int64_t>{0}, kScalarType<T>);
  };
  const Tensor grads[] = {gradient(grad_student), gradient(grad_teacher)};
  T* outs[] = {grad_student ? grads[0].template mutable_data_ptr<T>() : nullptr,
               grad_teacher ? grads[1].template mutable_data_ptr<T>() : nullptr};
  if (count < rows)
    for (T* out : outs)
      if (out) std::fill_n(out, rows * classes, T(0));
  if (count == 0) return {new_scalar<T>(student, 0), grads[0], grads[1]};

  const int64_t stride = spread<T>(round_up(classes, 2 * Vec<T>::size));
  T* memory = workspace<T, Scratch::student_logits>(2 * count * stride);
  Probabilities<T> probabilities{count, classes, stride, memory, memory + count * stride};
  const double scale = temperature * temperature, of_rows = scale * beta / count;
  const LogitRows<T> students(student), teachers(teacher);
  std::vector<Slopes<T>> slopes(count);
  std::vector<T> means(count);
  std::vector<double> differences(count);
  std::vector<char> shortened(count);
  const int64_t grain = std::max<int64_t>(kLogitsPerThread / classes, 1);
  parallel_blocks(count, 1, grain, [&](int64_t begin, int64_t end) {
    T* buffer = workspace<T, Scratch::row>(2 * classes);
    for (int64_t k = begin; k < end; ++k) {
      T *q = probabilities.student_row(k), *p = probabilities.teacher_row(k);
      std::fill(q + classes, q + stride, T(0));
      std::fill(p + classes, p + stride, T(0));
      Row<T> row(students.row(counted[k], buffer), teachers.row(counted[k], buffer + classes), classes,
                 T(1 / temperature), q, p);
      const Correlation r = row.correlate();
      differences[k] = r.difference;
      slopes[k] = {T(of_rows * r.of_both), T(of_rows * r.of_student), T(of_rows * r.of_teacher)};
      means[k] = T(1.0 / row.there);
      shortened[k] = row.there < classes;
    }
  });
  double inter = 0;
  for (const double difference : differences) inter += difference;
  for (const char is_short : shortened) probabilities.all_there &= !is_short;

  Columns<T> columns(probabilities);
  const double intra = columns.mean(scale * gamma);
  const double loss = scale * (beta * inter / count + gamma * intra);
  if (!grad_student && !grad_teacher) return {new_scalar<T>(student, loss), grads[0], grads[1]};

  std::vector<T> both(classes), of_student(classes), of_teacher(classes);
  for (int64_t j = 0; j < classes; ++j) {
    both[j] = columns.slopes[j].of_both;
    of_student[j] = columns.slopes[j].of_student;
    of_teacher[j] = columns.slopes[j].of_teacher;
  }
  parallel_blocks(count, 1, grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const T *q = probabilities.student_row(k), *p = probabilities.teacher_row(k);
      const Slopes<T> row = slopes[k];
      const T inverse = T(1 / temperature);
      if (grad_student)
        RowGradient<T>{q,
                       p,
                       classes,
                       means[k],
                       row.of_both,
                       row.of_student,
                       inverse,
                       columns.shift_student.data(),
                       columns.shift_teacher.data(),
                       columns.mean_student.data(),
                       columns.mean_teacher.data(),
                       both.data(),
                       of_student.data()}
            .write(outs[0] + counted[k] * classes);
      if (grad_teacher)
        RowGradient<T>{p,
                       q,
                       classes,
                       means[k],
                       row.of_both,
                       row.of_teacher,
                       inverse,
                       columns.shift_teacher.data(),
                       columns.shift_student.data(),
                       columns.mean_teacher.data(),
                       columns.mean_student.data(),
                       both.data(),
                       of_teacher.data()}
            .write(outs[1] + counted[k] * classes);
    }
  });
  return {new_scalar<T>(student, loss), grads[0], grads[1]};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> dist(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask,
                                        double beta, double gamma, double temperature, bool grad_student,
                                        bool grad_teacher) {
  check_dist(student, teacher, mask, beta, gamma, temperature);
  const bool in_double = any_double({student, teacher});
  return (in_double ? run<double> : run<float>)(student, teacher, mask, beta, gamma, temperature, grad_student,
                                                grad_teacher);
}

}  // namespace kdkernels

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  // Rows where the mask is false do not count.
  m.def(
      "dist(Tensor student, Tensor teacher, Tensor? mask, float beta, float gamma, float temperature, bool "
      "grad_student,"
      " bool grad_teacher) -> (Tensor loss, Tensor grad_student, Tensor grad_teacher)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) { m.impl("dist", TORCH_BOX(&kdkernels::dist)); }
