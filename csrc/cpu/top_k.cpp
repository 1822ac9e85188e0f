// What a divergence from a top-k teacher needs of the student: the exponents z / T of the teacher's classes, and the log-sum-exp of
// the exponents of all other classes, as one class. A row is copied to scratch memory, where the teacher's classes become -inf.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../checks/top_k.h"
#include "logit_rows.h"
#include "parallel.h"
#include "workspace.h"

namespace kdkernels {
namespace {

// The classes of a row that the teacher does not name.
template <typename T>
class Others {
  using V = typename Vec<T>::type;

 public:
  T max;
  double sum = 0, mean = 0;  // of exp((z - max) / T), and the mean of (z - max) / T under their softmax

  // `row` is overwritten by the exponentials. The teacher's classes get 0.
  Others(T* row, int64_t classes, const int64_t* chosen, int64_t count, int64_t step, T inverse_temperature)
      : row_(row), classes_(classes) {
    for (int64_t i = 0; i < count; ++i) row[chosen[i * step]] = -kInfinity<T>;
    max = max_of<T>(row, 0, classes, std::numeric_limits<T>::lowest());
    for_blocks(0, classes, [&](int64_t begin, int64_t end) {
      V sums{}, moments{};
      for_vectors<T>(begin, end, [&](int64_t j, int64_t lanes) {
        const V z = load_first<T>(row + j, lanes, -kInfinity<T>), below = (z - max) * inverse_temperature;
        const auto absent = z == -kInfinity<T>;
        const V e = absent ? V{} : exp_nonpositive<T>(below);
        store_first<T>(row + j, e, lanes);
        sums += e;
        moments += absent ? V{} : e * below;
      });
      sum += lane_sum<T>(sums);
      mean += lane_sum<T>(moments);
    });
    if (sum != 0) mean /= sum;
  }

  bool none() const { return sum == 0; }

  // factor times the softmax. The teacher's classes get 0.
  void scale(double factor) const {
    const T by = T(none() ? 0 : factor / sum);
    for_vectors<T>(0, classes_, [&](int64_t j, int64_t lanes) {
      store_first<T>(row_ + j, load_first<T>(row_ + j, lanes, T(0)) * by, lanes);
    });
  }

 private:
  T* row_;
  int64_t classes_;
};

template <typename T>
class Problem {
 public:
  int64_t rows, classes, count;

  Problem(const char* op, const Tensor& student, const Tensor& indices, const Tensor& temperatures)
      : rows(student.size(0)),
        classes(student.size(1)),
        count(indices.size(1)),
        students_(student),
        indices_(indices.const_data_ptr<int64_t>()),
        index_row_(indices.stride(0)),
        index_step_(indices.stride(1)),
        temperatures_(temperatures) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t k = 0; k < count; ++k)
        if (class_of(i, k) < 0 || class_of(i, k) >= classes)
          Check(op).fail("indices must be class indices from 0 to ", classes - 1, ", got ", class_of(i, k));
  }

  int64_t class_of(int64_t i, int64_t k) const { return indices_[i * index_row_ + k * index_step_]; }

  double temperature(int64_t i) const {
    const int64_t place = i * temperatures_.stride(0);
    if (temperatures_.scalar_type() == ScalarType::Double) return temperatures_.const_data_ptr<double>()[place];
    return temperatures_.const_data_ptr<float>()[place];
  }

  // Copy row i to `out`.
  void copy(int64_t i, T* out) const {
    const T* row = students_.row(i, out);
    if (row != out) std::copy_n(row, classes, out);
  }

  Others<T> others(int64_t i, T* row) const {
    return {row, classes, indices_ + i * index_row_, count, index_step_, T(1 / temperature(i))};
  }

  // Call f(i, scratch memory of a row) for all rows.
  template <typename F>
  void for_rows(const F& f) const {
    parallel_blocks(rows, 1, std::max<int64_t>(kLogitsPerThread / classes, 1), [&](int64_t begin, int64_t end) {
      T* const row = workspace<T, Scratch::row>(classes);
      for (int64_t i = begin; i < end; ++i) f(i, row);
    });
  }

 private:
  LogitRows<T> students_;
  const int64_t* indices_;
  int64_t index_row_, index_step_;
  Tensor temperatures_;
};

template <typename T>
Tensor run(const Tensor& student, const Tensor& indices, const Tensor& temperatures) {
  const Problem<T> problem("top_k", student, indices, temperatures);
  const int64_t count = problem.count;
  const Tensor exponents = new_compact(student, {problem.rows, count + 1}, kScalarType<T>);
  T* const all = exponents.mutable_data_ptr<T>();
  problem.for_rows([&](int64_t i, T* row) {
    T* const out = all + i * (count + 1);
    const double temperature = problem.temperature(i);
    if (temperature == 0) {
      std::fill_n(out, count + 1, T(0));
      return;
    }
    problem.copy(i, row);
    for (int64_t k = 0; k < count; ++k) out[k] = T(row[problem.class_of(i, k)] / temperature);
    const Others<T> others = problem.others(i, row);
    out[count] = others.none() ? -kInfinity<T> : T(double(others.max) / temperature + std::log(others.sum));
  });
  return exponents;
}

template <typename T>
std::tuple<Tensor, Tensor> run_backward(const Tensor& grad, const Tensor& student, const Tensor& indices,
                                        const Tensor& temperatures, bool want_student, bool want_temperatures) {
  const Problem<T> problem("top_k_backward", student, indices, temperatures);
  const int64_t rows = problem.rows, classes = problem.classes, count = problem.count;
  const Tensor grad_student =
      new_compact(student, want_student ? std::vector<int64_t>{rows, classes} : std::vector<int64_t>{0});
  const Tensor grad_temperatures =
      new_compact(student, want_temperatures ? std::vector<int64_t>{rows} : std::vector<int64_t>{0}, kScalarType<T>);
  const Tensor of_exponents = compact(grad);
  const T* const grads = of_exponents.const_data_ptr<T>();
  problem.for_rows([&](int64_t i, T* row) {
    const double temperature = problem.temperature(i);
    const T* const g = grads + i * (count + 1);
    double moment = 0;
    if (temperature == 0) {
      std::fill_n(row, classes, T(0));
    } else {
      problem.copy(i, row);
      for (int64_t k = 0; k < count; ++k) {
        const double logit = double(row[problem.class_of(i, k)]);
        if (logit != -INFINITY) moment += double(g[k]) * logit / temperature;
      }
      const Others<T> others = problem.others(i, row);
      if (!others.none()) moment += double(g[count]) * (double(others.max) / temperature + others.mean);
      others.scale(double(g[count]) / temperature);
      for (int64_t k = 0; k < count; ++k) row[problem.class_of(i, k)] = T(g[k] / temperature);
    }
    if (want_temperatures)
      grad_temperatures.mutable_data_ptr<T>()[i] = temperature == 0 ? T(0) : T(-moment / temperature);
    if (!want_student) return;
    with_element_type(grad_student, [&](auto element) {
      using E = decltype(element);
      narrow(row, classes, static_cast<E*>(grad_student.mutable_data_ptr()) + i * classes, 1);
    });
  });
  return {grad_student, grad_temperatures};
}

}  // namespace

Tensor top_k(const Tensor& student, const Tensor& indices, const Tensor& temperatures) {
  Check check("top_k");
  check_top_k(check, student, indices, temperatures);
  return (any_double({student}) ? run<double> : run<float>)(student, indices, temperatures);
}

std::tuple<Tensor, Tensor> top_k_backward(const Tensor& grad_exponents, const Tensor& student, const Tensor& indices,
                                          const Tensor& temperatures, bool grad_student, bool to_temperatures) {
  check_top_k_backward(grad_exponents, student, indices, temperatures);
  const auto chosen = any_double({student}) ? run_backward<double> : run_backward<float>;
  return chosen(grad_exponents, student, indices, temperatures, grad_student, to_temperatures);
}

}  // namespace kdkernels

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  // exponents: N x (k + 1), of the classes in indices, N x k, and of all others as one class. A row with the temperature 0 does not
  // count: its exponents and its gradient are 0.
  m.def("top_k(Tensor student, Tensor indices, Tensor temperatures) -> Tensor exponents");
  m.def(
      "top_k_backward(Tensor grad_exponents, Tensor student, Tensor indices, Tensor temperatures, bool grad_student,"
      " bool to_temperatures) -> (Tensor grad_student, Tensor grad_temperatures)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("top_k", TORCH_BOX(&kdkernels::top_k));
  m.impl("top_k_backward", TORCH_BOX(&kdkernels::top_k_backward));
}
