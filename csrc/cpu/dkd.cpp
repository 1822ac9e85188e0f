// Decoupled knowledge distillation. The kernel reads each row three times while it is in the cache, as kd does, but without
// the label's logit. What compares the label with all other classes are a few numbers per row, in double.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../checks/dkd.h"
#include "../two_classes.h"
#include "logit_rows.h"
#include "parallel.h"
#include "workspace.h"

namespace kdkernels {
namespace {

// One row of both networks. p and q are the softmax of teacher and student over the classes other than the label.
template <typename T>
class Row {
  using V = typename Vec<T>::type;

 public:
  Row(const T* student, const T* teacher, int64_t classes, int64_t label, double temperature, T* memory)
      : student_(student),
        teacher_(teacher),
        classes_(classes),
        label_(label),
        inverse_temperature_(T(1 / temperature)),
        exp_student_(memory),
        exp_teacher_(memory + classes),
        max_student_(max_of_others(student)),
        max_teacher_(max_of_others(teacher)) {
    if (max_student_ == -kInfinity<T>) max_student_ = 0;
    if (max_teacher_ == -kInfinity<T>) max_teacher_ = 0;
    exponentials();
    no_student_ = sum_student_ == 0;  // the maximum would not tell -inf from NaN
    no_teacher_ = sum_teacher_ == 0;
    const bool undecided =
        (no_student_ && no_teacher_) || (student[label] == -kInfinity<T> && teacher[label] == -kInfinity<T>);
    if (!undecided)
      pair_ = TwoClasses(margin(student, max_student_, sum_student_, temperature),
                         margin(teacher, max_teacher_, sum_teacher_, temperature));
  }

  // Return alpha TCKD + beta NCKD. `gradient`, unless null, receives factor times its gradient to the student.
  double run(double alpha, double beta, double factor, T* gradient) const {
    const double of_pair = alpha * pair_.divergence;
    if (gradient) gradient[label_] = T(factor * alpha * pair_.student);
    // A student without other classes excludes what the teacher expects. A teacher without them expects nothing.
    const bool compared = !no_student_ && !no_teacher_;
    const double divergence =
        compare(T(factor * alpha * pair_.student), T(factor * (no_teacher_ ? 0 : beta)), gradient);
    return of_pair + (compared ? beta * divergence : (no_teacher_ || beta == 0) ? 0 : beta * kInfinity<double>);
  }

  // factor (beta p (log(p / q) - NCKD) - alpha s p), where s is the slope of TCKD. Logarithms are relative to the teacher's
  // largest class, as in kd.
  void gradient_teacher(double alpha, double beta, double factor, T* out) const {
    out[label_] = T(factor * alpha * pair_.teacher);
    if (no_teacher_) beta = 0;
    const T there = student_[top()];
    const auto ratio = [&](int64_t j, int64_t count) {
      const V d = log_ratio(there, j, count, T(0));
      return load_first<T>(exp_teacher_ + j, count, T(0)) == T(0) ? V{} : d;
    };
    double total = 0;
    for_others([&](int64_t begin, int64_t end) {
      total += sum_over<T>(begin, end, [&](int64_t j, int64_t count) {
        return load_first<T>(exp_teacher_ + j, count, T(0)) * ratio(j, count);
      });
    });
    const double inverse = inverse_of(sum_teacher_);
    const T mean = T(total * inverse), of_others = T(factor * beta * inverse),
            of_pair = T(factor * alpha * pair_.teacher * inverse);
    for_others([&](int64_t begin, int64_t end) {
      for_vectors<T>(begin, end, [&](int64_t j, int64_t count) {
        const V e = load_first<T>(exp_teacher_ + j, count, T(0));
        store_first<T>(out + j, e * (of_others * (ratio(j, count) - mean) - of_pair), count);
      });
    });
  }

 private:
  template <typename F>
  void for_others(const F& f) const {
    if (label_ > 0) f(int64_t(0), label_);
    if (label_ + 1 < classes_) f(label_ + 1, classes_);
  }

  T max_of_others(const T* row) const {
    T largest = -kInfinity<T>;
    for_others([&](int64_t begin, int64_t end) { largest = max_of<T>(row, begin, end, largest); });
    return largest;
  }

  void exponentials() {
    const T exponent = T(kLog2e<double> * inverse_temperature_);
    for_others([&](int64_t first, int64_t last) {
      for_blocks(first, last, [&](int64_t begin, int64_t end) {
        V sum_s{}, sum_t{};
        for_vectors<T>(begin, end, [&](int64_t j, int64_t count) {
          const auto valid = first_lanes<T>(count);
          const V s = valid ? exp2_or_zero<T>(below(student_, max_student_, j, count) * exponent) : V{};
          const V t = valid ? exp2_or_zero<T>(below(teacher_, max_teacher_, j, count) * exponent) : V{};
          store_first<T>(exp_student_ + j, s, count);
          store_first<T>(exp_teacher_ + j, t, count);
          sum_s += s;
          sum_t += t;
        });
        sum_student_ += lane_sum<T>(sum_s);
        sum_teacher_ += lane_sum<T>(sum_t);
      });
    });
  }

  // log(p / (1 - p)) of the label's probability p.
  double margin(const T* row, T max, double sum, double temperature) const {
    if (row[label_] == kInfinity<T>) return std::numeric_limits<double>::quiet_NaN();
    return (double(row[label_]) - double(max)) / temperature - std::log(sum);
  }

  // KL(p, q) as in kd: the sum of p log(p / q) - p + q. `gradient` receives beta (q - p) - alpha q.
  double compare(T alpha, T beta, T* gradient) const {
    const T inverse_p = T(inverse_of(sum_teacher_)), inverse_q = T(inverse_of(sum_student_)),
            log_sums = T(std::log(sum_student_ / sum_teacher_));
    double total = 0;
    for_others([&](int64_t begin, int64_t end) {
      total += sum_over<T>(begin, end, [&](int64_t j, int64_t count) {
        const V p = load_first<T>(exp_teacher_ + j, count, T(0)) * inverse_p;
        const V q = load_first<T>(exp_student_ + j, count, T(0)) * inverse_q;
        V d = log_ratio(max_student_, j, count, log_sums);
        d = load_first<T>(teacher_ + j, count, T(0)) == -kInfinity<T> ? V{} - T(1) : d;  // p is 0, and any d will do
        const V pd = d == kInfinity<T> ? d : p * d;                                      // p may have been rounded to 0
        const auto small = (d < T(0.5)) & (d > T(-0.5));
        const V term = small ? p * exp_remainder<T>(d) : pd - (p - q);
        if (gradient) store_first<T>(gradient + j, beta * (small ? term - pd : q - p) - alpha * q, count);
        return term;
      });
    });
    return total;
  }

  static double inverse_of(double sum) { return sum == 0 ? 0 : 1 / sum; }

  // The teacher's largest class among the others.
  int64_t top() const {
    for (int64_t j = 0; j < classes_; ++j)
      if (j != label_ && teacher_[j] == max_teacher_) return j;
    return label_;
  }

  // Subtract before anything is rounded. Near the maximum, the difference is exact.
  V below(const T* row, T max, int64_t j, int64_t count) const { return load_first<T>(row + j, count, max) - max; }

  // log(p / q) up to a constant, from the differences to the teacher's largest logit and to one logit of the student.
  V log_ratio(T of_student, int64_t j, int64_t count, T constant) const {
    const V difference = below(teacher_, max_teacher_, j, count) - below(student_, of_student, j, count);
    return difference * inverse_temperature_ + constant;
  }

  const T *student_, *teacher_;
  int64_t classes_, label_;
  T inverse_temperature_;
  T *exp_student_, *exp_teacher_;  // exp((x - max) / T); the label has no entry
  T max_student_, max_teacher_;
  bool no_student_, no_teacher_;  // whether all other classes have -inf
  double sum_student_ = 0, sum_teacher_ = 0;
  TwoClasses pair_;
};

// Return how many rows count. Throws if a label is no class.
int64_t count_rows(const int64_t* labels, int64_t stride, int64_t rows, int64_t classes, int64_t ignore_index) {
  int64_t count = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t label = labels[i * stride];
    if (label == ignore_index) continue;
    if (label < 0 || label >= classes)
      Check("dkd").fail("labels must be class indices from 0 to ", classes - 1, ", or ignore_index=", ignore_index,
                        ", got ", label);
    ++count;
  }
  return count;
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> run(const Tensor& student, const Tensor& teacher, const Tensor& labels, double alpha,
                                       double beta, double temperature, int64_t reduction, int64_t ignore_index,
                                       bool grad_student, bool grad_teacher) {
  const int64_t rows = student.size(0), classes = student.size(1), step = labels.stride(0);
  const int64_t* of_rows = labels.const_data_ptr<int64_t>();
  const int64_t count = count_rows(of_rows, step, rows, classes, ignore_index);
  const LogitRows<T> students(student), teachers(teacher);
  const auto gradient = [&](bool wanted) {
    return new_compact(student, wanted ? std::vector<int64_t>{rows, classes} : std::vector<int64_t>{0}, kScalarType<T>);
  };
  const Tensor student_gradient = gradient(grad_student), teacher_gradient = gradient(grad_teacher);
  T* student_out = grad_student ? student_gradient.mutable_data_ptr<T>() : nullptr;
  T* teacher_out = grad_teacher ? teacher_gradient.mutable_data_ptr<T>() : nullptr;
  const double divisor = reduction == 0 ? double(std::max<int64_t>(count, 1)) : 1.0, factor = temperature / divisor;

  std::vector<double> losses(rows);
  parallel_blocks(rows, 1, std::max<int64_t>(kLogitsPerThread / classes, 1), [&](int64_t begin, int64_t end) {
    T* memory = workspace<T, Scratch::row>(4 * classes);
    for (int64_t i = begin; i < end; ++i) {
      T* of_student = student_out ? student_out + i * classes : nullptr;
      T* of_teacher = teacher_out ? teacher_out + i * classes : nullptr;
      const int64_t label = of_rows[i * step];
      if (label == ignore_index) {
        if (of_student) std::fill_n(of_student, classes, T(0));
        if (of_teacher) std::fill_n(of_teacher, classes, T(0));
        continue;
      }
      const Row<T> row(students.row(i, memory), teachers.row(i, memory + classes), classes, label, temperature,
                       memory + 2 * classes);
      losses[i] = row.run(alpha, beta, factor, of_student);
      if (of_teacher) row.gradient_teacher(alpha, beta, factor, of_teacher);
    }
  });
  const double scale = temperature * temperature / divisor;
  if (reduction == 2) {
    const Tensor of_each = new_compact(student, {rows}, kScalarType<T>);
    T* const out = of_each.mutable_data_ptr<T>();
    for (int64_t i = 0; i < rows; ++i) out[i] = T(scale * losses[i]);
    return {of_each, student_gradient, teacher_gradient};
  }
  double loss = 0;
  for (const double row_loss : losses) loss += row_loss;
  return {new_scalar<T>(student, scale * loss), student_gradient, teacher_gradient};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> dkd(const Tensor& student, const Tensor& teacher, const Tensor& labels, double alpha,
                                       double beta, double temperature, int64_t reduction, int64_t ignore_index,
                                       bool grad_student, bool grad_teacher) {
  check_dkd(student, teacher, labels, alpha, beta, temperature, reduction);
  const bool in_double = any_double({student, teacher});
  return (in_double ? run<double> : run<float>)(student, teacher, labels, alpha, beta, temperature, reduction,
                                                ignore_index, grad_student, grad_teacher);
}

}  // namespace kdkernels

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  // Rows whose label is ignore_index do not count. reduction: 0 mean, 1 sum, 2 one loss per row.
  m.def(
      "dkd(Tensor student, Tensor teacher, Tensor labels, float alpha, float beta, float temperature, int reduction,"
      " int ignore_index, bool grad_student, bool grad_teacher) -> (Tensor loss, Tensor grad_student, Tensor "
      "grad_teacher)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) { m.impl("dkd", TORCH_BOX(&kdkernels::dkd)); }
