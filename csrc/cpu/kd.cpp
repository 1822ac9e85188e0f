// Temperature-softened KL divergence. The kernel reads each row of logits three times while it is in the cache: for the maxima,
// for the exponentials and their sums, and for the divergence and the student's gradient. The teacher's gradient needs two more
// passes.
#include <algorithm>
#include <cmath>

#include "../checks/kd.h"
#include "logit_rows.h"
#include "parallel.h"
#include "workspace.h"

namespace kdkernels {
namespace {

// One row of both networks, with p and q the softmax of teacher and student.
template <typename T>
struct Row {
  using V = typename Vec<T>::type;

  const T *student, *teacher;
  int64_t classes;
  T inverse_temperature;
  T *exp_student, *exp_teacher;  // exp((x - max) / T): q and p without the division by their sums
  T max_student = max_of<T>(student, 0, classes, student[0]), max_teacher = max_of<T>(teacher, 0, classes, teacher[0]);
  double sum_student = 0, sum_teacher = 0;

  void exponentials() {
    const T exponent = T(kLog2e<double> * inverse_temperature);
    for_blocks(0, classes, [&](int64_t begin, int64_t end) {
      V sum_s{}, sum_t{};
      for_vectors<T>(begin, end, [&](int64_t j, int64_t count) {
        const auto valid = first_lanes<T>(count);
        const V s = valid ? exp2_or_zero<T>(below(student, max_student, j, count) * exponent) : V{};
        const V t = valid ? exp2_or_zero<T>(below(teacher, max_teacher, j, count) * exponent) : V{};
        store_first<T>(exp_student + j, s, count);
        store_first<T>(exp_teacher + j, t, count);
        sum_s += s;
        sum_t += t;
      });
      sum_student += lane_sum<T>(sum_s);
      sum_teacher += lane_sum<T>(sum_t);
    });
  }

  // KL(p, q) = sum of p log(p / q) - p + q. With d = log(p / q), each term is p (exp(-d) - 1 + d) >= 0. So a small divergence
  // is as precise as a large one. `gradient`, unless null, receives factor (q - p).
  //
  // `absent`: whether logits may be -inf. If the teacher has -inf, p is 0. If only the student has -inf, the sum is +inf.
  template <bool absent>
  double divergence(double factor, T* gradient) const {
    const T inverse_p = T(1 / sum_teacher), inverse_q = T(1 / sum_student),
            log_sums = T(std::log(sum_student / sum_teacher));
    return sum_over<T>(0, classes, [&](int64_t j, int64_t count) {
      const V p = load_first<T>(exp_teacher + j, count, T(0)) * inverse_p;
      const V q = load_first<T>(exp_student + j, count, T(0)) * inverse_q;
      V d = log_ratio(max_student, j, count, log_sums);
      if (absent) d = no_teacher(j, count) ? V{} + T(1) : d;  // any number, because p is 0
      const V pd = p * d;
      const auto small = (d < T(0.5)) & (d > T(-0.5));
      V term = small ? p * exp_remainder<T>(d) : pd - (p - q);
      if (absent) term = only_teacher(j, count) ? V{} + (log_sums + T(INFINITY)) : term;
      if (gradient) store_first<T>(gradient + j, T(factor) * (small ? term - pd : q - p), count);
      return term;
    });
  }

  // factor p (log(p / q) - divergence), with logarithms relative to the teacher's largest class. If its p is nearly 1, the
  // divergence is nearly its logarithm, and the difference would cancel. `absent`: classes that a network has not add nothing.
  template <bool absent>
  void gradient_teacher(double factor, T* out) const {
    const int64_t top = std::min(position_of(teacher, classes, max_teacher), classes - 1);
    const T of_student = absent ? max_student : student[top],
            constant = absent ? T(std::log(sum_student / sum_teacher)) : T(0);
    const auto ratio = [&](int64_t j, int64_t count) {
      const V d = log_ratio(of_student, j, count, constant);
      if (!absent) return d;
      return no_teacher(j, count) | only_teacher(j, count) ? V{} : d;
    };
    const auto exponentials = [&](int64_t j, int64_t count) { return load_first<T>(exp_teacher + j, count, T(0)); };
    const double total =
        sum_over<T>(0, classes, [&](int64_t j, int64_t count) { return exponentials(j, count) * ratio(j, count); });
    const T scale = T(factor / sum_teacher), mean = T(total / sum_teacher);
    for_vectors<T>(0, classes, [&](int64_t j, int64_t count) {
      store_first<T>(out + j, exponentials(j, count) * scale * (ratio(j, count) - mean), count);
    });
  }

 private:
  V student_at(int64_t j, int64_t count) const { return load_first<T>(student + j, count, max_student); }
  V teacher_at(int64_t j, int64_t count) const { return load_first<T>(teacher + j, count, max_teacher); }
  auto no_teacher(int64_t j, int64_t count) const { return teacher_at(j, count) == -T(INFINITY); }
  auto only_teacher(int64_t j, int64_t count) const {
    return (student_at(j, count) == -T(INFINITY)) & (teacher_at(j, count) > -T(INFINITY));
  }

  // Subtract before anything is rounded. Near the maximum, the difference is exact.
  V below(const T* row, T max, int64_t j, int64_t count) const { return load_first<T>(row + j, count, max) - max; }

  // log(p / q) up to a constant, from the differences to the teacher's largest logit and to one logit of the student.
  V log_ratio(T of_student, int64_t j, int64_t count, T constant) const {
    const V difference = below(teacher, max_teacher, j, count) - below(student, of_student, j, count);
    return difference * inverse_temperature + constant;
  }
};

template <typename T>
std::tuple<Tensor, Tensor, Tensor> run(const Tensor& student, const Tensor& teacher, double temperature, double scale,
                                       bool grad_student, bool grad_teacher) {
  const int64_t rows = student.size(0), classes = student.size(1);
  const LogitRows<T> students(student), teachers(teacher);
  const auto gradient = [&](bool wanted) {
    return new_compact(student, wanted ? std::vector<int64_t>{rows, classes} : std::vector<int64_t>{0}, kScalarType<T>);
  };
  const Tensor student_gradient = gradient(grad_student), teacher_gradient = gradient(grad_teacher);
  T* student_out = grad_student ? student_gradient.mutable_data_ptr<T>() : nullptr;
  T* teacher_out = grad_teacher ? teacher_gradient.mutable_data_ptr<T>() : nullptr;
  const double factor = scale / (rows * temperature);

  std::vector<double> losses(rows);
  parallel_blocks(rows, 1, std::max<int64_t>(kLogitsPerThread / classes, 1), [&](int64_t begin, int64_t end) {
    T* buffer = workspace<T, Scratch::row>(4 * classes);
    for (int64_t i = begin; i < end; ++i) {
      Row<T> row{
          students.row(i, buffer), teachers.row(i, buffer + classes), classes, T(1 / temperature), buffer + 2 * classes,
          buffer + 3 * classes};
      row.exponentials();
      T* const of_student = student_out ? student_out + i * classes : nullptr;
      T* const of_teacher = teacher_out ? teacher_out + i * classes : nullptr;
      losses[i] = row.template divergence<false>(factor, of_student);
      const bool absent = !std::isfinite(losses[i]);
      if (absent) losses[i] = row.template divergence<true>(factor, of_student);
      if (of_teacher)
        absent ? row.template gradient_teacher<true>(factor, of_teacher)
               : row.template gradient_teacher<false>(factor, of_teacher);
    }
  });
  double loss = 0;
  for (const double row_loss : losses) loss += row_loss;
  return {new_scalar<T>(student, loss * scale / rows), student_gradient, teacher_gradient};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> kd(const Tensor& student, const Tensor& teacher, double temperature, double scale,
                                      bool grad_student, bool grad_teacher) {
  check_kd(student, teacher, temperature, scale);
  const bool in_double = student.scalar_type() == ScalarType::Double || teacher.scalar_type() == ScalarType::Double;
  return (in_double ? run<double> : run<float>)(student, teacher, temperature, scale, grad_student, grad_teacher);
}

}  // namespace kdkernels

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  // Gradients belong to the loss. They are float32 (float64 for float64 inputs), and empty if they are not wanted. tf32:
  // whether factors of float32 products may be rounded to tf32. The CPU never does this.
  m.def(
      "kd(Tensor student, Tensor teacher, float temperature, float scale, bool grad_student, bool grad_teacher)"
      " -> (Tensor loss, Tensor grad_student, Tensor grad_teacher)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) { m.impl("kd", TORCH_BOX(&kdkernels::kd)); }
