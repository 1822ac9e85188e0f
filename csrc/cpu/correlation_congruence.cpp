// The whole CCKD loss in one call. It normalises the embeddings of both networks, compares their kernel matrices strip by
// strip, and computes the gradients through the norm.
#include <vector>

#include "../checks/correlation_congruence.h"
#include "../relations.h"
#include "congruence.h"
#include "exp.h"
#include "rows.h"
#include "strips.h"
#include "tensors.h"
#include "workspace.h"

namespace kdkernels {
namespace {

enum class Metric : int64_t { taylor_rbf = 0, rbf = 1, bilinear = 2, mmd = 3 };

constexpr double kEps = 1e-12;  // an embedding of this norm or less is the zero vector

template <typename T>
struct Entry {
  typename Vec<T>::type value, slope;
};

// A kernel computes an entry from g = x_i · x_j and from one term per row. own() is g on the diagonal. The slope is the
// derivative with respect to g, or to the rows' terms if there are no products.

template <typename T>
struct TaylorRbf {
  using V = typename Vec<T>::type;
  static constexpr bool products = true, row_sums = false;

  // exp(−2γ) (2γ)^p / p! for p = 1, 2, ... The constant cancels in the difference.
  std::vector<T> coefficients;

  TaylorRbf(double gamma, int64_t order) {
    double coefficient = std::exp(-2 * gamma);
    order = nonzero_terms(gamma, order);
    for (int64_t p = 1; p <= order; ++p) coefficients.push_back(T(coefficient *= 2 * gamma / p));
  }
  T term(const T*, int64_t) const { return 0; }
  T own(T g, T) const { return g; }
  Entry<T> at(V g, T, V) const {
    V value{}, slope{};
    for (int64_t p = coefficients.size() - 1; p >= 0; --p) {
      slope = slope * g + value;
      value = value * g + coefficients[p];
    }
    return {value * g, slope * g + value};
  }
};

// The derivative with respect to x_i is the derivative with respect to g, times x_j − x_i. The row sums are the factors of
// −x_i.
template <typename T>
struct Rbf {
  using V = typename Vec<T>::type;
  static constexpr bool products = true, row_sums = true;
  static constexpr double sign = 1;

  T gamma;

  T term(const T* row, int64_t width) const { return T(dot(row, row, width)); }
  T own(T, T square) const { return square; }
  Entry<T> at(V g, T square, V squares) const {
    const V distance = square + squares - 2 * g;
    const V value = exp_nonpositive<T>(-gamma * (distance < 0 ? V{} : distance));
    return {value, 2 * gamma * value};
  }
};

template <typename T>
struct Mmd {
  using V = typename Vec<T>::type;
  static constexpr bool products = false, row_sums = true;
  static constexpr double sign = -1;

  T term(const T* row, int64_t width) const {
    return T(sum_vectors<T>(0, width, [&](int64_t j, int64_t count) { return load_first<T>(row + j, count, 0); }) /
             width);
  }
  T own(T, T) const { return 0; }
  Entry<T> at(V, T mean, V means) const {
    const V difference = mean - means, one = V{} + 1;
    const V slope = difference > 0 ? one : difference < 0 ? -one : V{};
    return {difference < 0 ? -difference : difference, slope};
  }
};

// One network's embeddings and their gradient.
template <typename T>
struct Side {
  Operand<T> operand;
  Gradient<T> gradient;
  double factor;  // of the gradient
  std::vector<T> terms;
  std::vector<double> row_sums;
};

// The loss of one row of the difference of two kernel matrices.
template <typename T, typename Kernel>
struct Comparison {
  using V = typename Vec<T>::type;
  const Kernel& kernel;
  const Side<T>&x, &y;

  double operator()(int64_t r, int64_t length, const std::array<T*, 2>& entries) const {
    const auto [of_x, of_y] = entries;
    const T *terms_x = x.terms.data() + r, *terms_y = y.terms.data() + r;
    *of_x = kernel.own(*of_x, *terms_x);
    *of_y = kernel.own(*of_y, *terms_y);
    T own = 0;
    const double squares = sum_vectors<T>(0, length, [&](int64_t j, int64_t count) {
      const auto entry = [&](const T* products, const T* terms) {
        return kernel.at(load_first<T>(products + j, count, 0), *terms, load_first<T>(terms + j, count, 0));
      };
      const Entry<T> a = entry(of_x, terms_x), b = entry(of_y, terms_y);
      const V difference = a.value - b.value;
      if (j == 0) own = difference[0];
      if (x.gradient.data) store_first<T>(of_x + j, difference * a.slope, count);
      if (y.gradient.data) store_first<T>(of_y + j, difference * b.slope, count);
      return difference * difference;
    });
    return 2 * squares - double(own) * own;
  }
};

template <typename T, typename Kernel>
double compare(const Kernel& kernel, int64_t rows, Side<T>& x, Side<T>& y) {
  std::vector<Target<T>> targets;
  std::array<Gram<T>, 2> grams;
  const std::array<Side<T>*, 2> sides{&x, &y};
  for (int64_t m = 0; m < 2; ++m) {
    Side<T>& side = *sides[m];
    const bool wanted = side.gradient.data;
    side.terms.resize(rows);
    parallel_blocks(rows, 1, 1 + (1 << 15) / side.operand.width, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) side.terms[r] = kernel.term(side.operand.rows.at(r, 0), side.operand.width);
    });
    if (Kernel::row_sums && wanted) side.row_sums.assign(rows, 0);
    if (Kernel::products) grams[m] = {&side.operand, nullptr};
    if (Kernel::products && wanted) targets.push_back({side.operand, &side.gradient, T(side.factor), m});
  }
  const auto add_row_sums = [&]([[maybe_unused]] const Strip<T, 2>& strip) {
    if constexpr (Kernel::row_sums)
      for (int64_t m = 0; m < 2; ++m)
        if (!sides[m]->row_sums.empty())
          strip.add_row_sums(sides[m]->row_sums.data() + strip.begin, Kernel::sign,
                             [&](const auto& at, int64_t count) { return load_first<T>(at[m], count, 0); });
  };
  return Strips<T, 2>(rows, grams, std::move(targets)).run(Comparison<T, Kernel>{kernel, x, y}, add_row_sums);
}

// Add the part of row r's gradient that the row sums give.
template <typename T>
void add_own(const Rbf<T>&, const Side<T>& side, int64_t r) {
  const T factor = T(side.factor * side.row_sums[r]), *row = side.operand.rows.at(r, 0);
  T* out = side.gradient.data + r * side.operand.width;
  for (int64_t j = 0; j < side.operand.width; ++j) out[j] -= factor * row[j];
}

template <typename T>
void add_own(const Mmd<T>&, const Side<T>& side, int64_t r) {
  const int64_t width = side.operand.width;
  std::fill_n(side.gradient.data + r * width, width, T(side.factor * side.row_sums[r] / width));
}

template <typename T, typename Kernel>
double run_kernel(const Kernel& kernel, int64_t rows, Side<T>& x, Side<T>& y) {
  const double loss = compare(kernel, rows, x, y);
  if constexpr (Kernel::row_sums)
    for (const Side<T>* side : {&x, &y})
      if (side->gradient.data)
        parallel_blocks(rows, 1, 1 + (1 << 14) / side->operand.width, [&](int64_t begin, int64_t end) {
          for (int64_t r = begin; r < end; ++r) add_own(kernel, *side, r);
        });
  return loss;
}

// Move the rows to their common centre. Distances do not change, but the products that give them cancel less.
template <typename T>
void centre(T* rows, int64_t count, int64_t width) {
  parallel_blocks(width, 64 / sizeof(T), 1 + (1 << 14) / count, [&](int64_t begin, int64_t end) {
    std::vector<double> sums(end - begin);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t j = begin; j < end; ++j) sums[j - begin] += rows[r * width + j];
    for (double& sum : sums) sum /= count;
    for (int64_t r = 0; r < count; ++r)
      for (int64_t j = begin; j < end; ++j) rows[r * width + j] = T(rows[r * width + j] - sums[j - begin]);
  });
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> run(const Tensor& student, const Tensor& teacher, Metric metric, double gamma,
                                       int64_t order, bool normalize, double scale, const Plan& plan, bool grad_student,
                                       bool grad_teacher) {
  const int64_t rows = student.size(0);
  const auto new_gradient = [&](const Tensor& embeddings, bool wanted) {
    return new_compact(student, wanted ? std::vector<int64_t>{rows, embeddings.size(1)} : std::vector<int64_t>{0},
                       kScalarType<T>);
  };
  const Tensor student_gradient = new_gradient(student, grad_student),
               teacher_gradient = new_gradient(teacher, grad_teacher);
  T* norms_x = workspace<T, Scratch::norms_x>(rows);
  T* norms_y = workspace<T, Scratch::norms_y>(rows);
  const auto side_of = [&](const Tensor& embeddings, bool is_student, T* norms, const Tensor& gradient, bool wanted) {
    const int64_t width = embeddings.size(1);
    T* out = wanted ? gradient.mutable_data_ptr<T>() : nullptr;
    Side<T> side{{{}, width}, {out, width}, is_student ? 4 * scale : -4 * scale, {}, {}};
    const bool shifted = metric == Metric::rbf && !normalize;
    if (!normalize && !shifted && readable<T>(embeddings)) {
      side.operand.rows = {embeddings.const_data_ptr<T>(), embeddings.stride(0), 1};
      return side;
    }
    T* copy = is_student ? workspace<T, Scratch::rows_x>(rows * width) : workspace<T, Scratch::rows_y>(rows * width);
    copy_rows<T>(embeddings, copy, [&](int64_t r, T* row) {
      if (normalize) norms[r] = normalise(row, width, kEps);
    });
    if (shifted) centre(copy, rows, width);
    side.operand.rows = {copy, width, 1};
    return side;
  };
  Side<T> x = side_of(student, true, norms_x, student_gradient, grad_student),
          y = side_of(teacher, false, norms_y, teacher_gradient, grad_teacher);

  double loss = 0;
  switch (metric) {
    case Metric::taylor_rbf:
      loss = scale * run_kernel(TaylorRbf<T>(gamma, order), rows, x, y);
      break;
    case Metric::rbf:
      loss = scale * run_kernel(Rbf<T>{T(gamma)}, rows, x, y);
      break;
    case Metric::mmd:
      loss = scale * run_kernel(Mmd<T>{}, rows, x, y);
      break;
    case Metric::bilinear:
      const Congruence<T> problem{
          x.operand.rows, y.operand.rows, rows, x.operand.width, y.operand.width, 1, {scale, 0, 0, 0}, plan};
      loss = problem.run(x.gradient.data, y.gradient.data);
  }
  const auto take_back = [&](const Side<T>& side, const T* norms) {
    const int64_t width = side.operand.width;
    parallel_blocks(rows, 1, 1 + (1 << 14) / width, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        T* gradient = side.gradient.data + r * width;
        denormalise_row(gradient, side.operand.rows.at(r, 0), norms[r], width, gradient);
      }
    });
  };
  if (normalize && grad_student) take_back(x, norms_x);
  if (normalize && grad_teacher) take_back(y, norms_y);
  return {new_scalar<T>(student, loss), student_gradient, teacher_gradient};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> correlation_congruence(const Tensor& student, const Tensor& teacher, int64_t kernel,
                                                          double gamma, int64_t order, bool normalize, double scale,
                                                          const std::vector<int64_t>& plan, bool grad_student,
                                                          bool grad_teacher, bool) {
  check_correlation_congruence(student, teacher, kernel, gamma, order, scale, plan, grad_teacher);
  const bool in_double = student.scalar_type() == ScalarType::Double || teacher.scalar_type() == ScalarType::Double;
  return (in_double ? run<double> : run<float>)(student, teacher, Metric(kernel), gamma, order, normalize, scale,
                                                plan_of(plan.data()), grad_student, grad_teacher);
}

}  // namespace kdkernels

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  // kernel: 0 taylor_rbf, 1 rbf, 2 bilinear, 3 mmd. plan: three form codes of the bilinear kernel.
  m.def(
      "correlation_congruence(Tensor student, Tensor teacher, int kernel, float gamma, int order, bool normalize,"
      " float scale, int[] plan, bool grad_student, bool grad_teacher, bool tf32=False)"
      " -> (Tensor loss, Tensor grad_student, Tensor grad_teacher)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("correlation_congruence", TORCH_BOX(&kdkernels::correlation_congruence));
}
