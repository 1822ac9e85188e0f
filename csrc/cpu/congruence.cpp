#include "congruence.h"

#include <numeric>
#include <vector>

#include "../checks/congruence.h"
#include "strips.h"
#include "tensors.h"

namespace kdkernels {
namespace {

// The loss of one row of the difference of two Gram matrices, from the relations of its pairs.
template <typename T>
struct Relations {
  Coefficients weights;
  int64_t positions;

  // `entries` has row r from the diagonal on. The factors of the targets contain only weights.full, so entries with another
  // weight are scaled here.
  double operator()(int64_t r, int64_t length, const std::array<T*, 1>& entries) const {
    const Coefficients& w = weights;
    T* from = entries[0];
    double loss = 2 * w.full * sum_squares(from + 1, length - 1);
    const auto relate = [&](int64_t j, double extra) {
      loss += 2 * extra * double(from[j]) * from[j];
      from[j] *= T(1 + extra / w.full);
    };
    if (w.intra != 0)
      for (int64_t j = 1; j < positions - r % positions; ++j) relate(j, w.intra);
    if (w.inter_same != 0)
      for (int64_t j = positions; j < length; j += positions) relate(j, w.inter_same);
    const double own = w.full + w.intra + w.inter_same + w.diagonal;
    loss += own * double(from[0]) * from[0];
    from[0] *= T(own / w.full);
    return loss;
  }
};

// Compare one set of rows in full: c * ‖X Xᵀ − Y Yᵀ‖², with each term in the space of its form.
template <typename T>
class Block {
 public:
  Block(int64_t rows, Operand<T> x, Operand<T> y, double coefficient, Gradient<T>& grad_x, Gradient<T>& grad_y)
      : rows_(rows),
        x_(x),
        y_(y),
        coefficient_(coefficient),
        slope_(4 * coefficient),
        grad_x_(grad_x),
        grad_y_(grad_y) {}

  double run(Form form) {
    if (form == Form::gram) return difference();
    // The mixed form reads the cross term from the student's gradient, so it runs before anything else is added there.
    const double teacher_and_cross = form == Form::mixed
                                         ? teacher_and_cross_gram()
                                         : coefficient_ * (own_feature(y_, grad_y_) - 2 * cross_feature());
    return teacher_and_cross + coefficient_ * own_feature(x_, grad_x_);
  }

 private:
  double difference() const {
    std::vector<Target<T>> targets;
    if (grad_x_.data) targets.push_back({x_, &grad_x_, slope_});
    if (grad_y_.data) targets.push_back({y_, &grad_y_, -slope_});
    return strips(&x_, &y_, std::move(targets));
  }

  double strips(const Operand<T>* plus, const Operand<T>* minus, std::vector<Target<T>> targets) const {
    return Strips<T>(rows_, {{{plus, minus}}}, std::move(targets)).run(Relations<T>{{coefficient_, 0, 0, 0}, 1});
  }

  // Return ‖RᵀR‖². Add R (RᵀR) to the gradient of R.
  double own_feature(const Operand<T>& own, Gradient<T>& gradient) const {
    T* product = workspace<T, Scratch::product>(own.width * own.width);
    gemm<T>(own.width, own.width, rows_, own.rows.transposed(), own.rows, product, own.width, {1, false, true});
    const double norm = sum_squares_symmetric(product, own.width);
    if (gradient.data) {
      mirror_upper(product, own.width, own.width);
      add_product(own, {product, own.width, 1}, own.width, slope_, gradient);
    }
    return norm;
  }

  // Return ‖YᵀX‖². Add −Y (YᵀX) and −X (XᵀY) to the gradients.
  double cross_feature() const {
    T* product = workspace<T, Scratch::product>(y_.width * x_.width);
    gemm<T>(y_.width, x_.width, rows_, y_.rows.transposed(), x_.rows, product, x_.width);
    const View<T> matrix{product, x_.width, 1};
    if (grad_x_.data) add_product(y_, matrix, x_.width, -slope_, grad_x_);
    if (grad_y_.data) add_product(x_, matrix.transposed(), y_.width, -slope_, grad_y_);
    return sum_squares(product, x_.width * y_.width);
  }

  // Return ‖Y Yᵀ‖² − 2 ⟨X, (Y Yᵀ) X⟩. (Y Yᵀ) X is the gradient of the cross term.
  double teacher_and_cross_gram() const {
    Buffer<T> scratch(grad_x_.data ? 0 : rows_ * x_.width);
    Gradient<T> unwanted{scratch.data(), x_.width};
    Gradient<T>& product = grad_x_.data ? grad_x_ : unwanted;
    const double teacher = strips(nullptr, &y_, {{x_, &product, slope_}});  // these are strips of −Y Yᵀ
    double cross = 0;
    for (int64_t i = 0; i < rows_; ++i)
      for (int64_t j = 0; j < x_.width; ++j) cross += double(*x_.rows.at(i, j)) * product.data[i * product.line + j];
    return teacher + cross / 2;
  }

  void add_product(const Operand<T>& operand, View<T> matrix, int64_t width, T alpha, Gradient<T>& gradient) const {
    gemm<T>(rows_, width, operand.width, operand.rows, matrix, gradient.data, gradient.line, {alpha, gradient.written});
    gradient.written = true;
  }

  int64_t rows_;
  Operand<T> x_, y_;
  double coefficient_;
  T slope_;  // of the loss with respect to D; doubled because D is symmetric
  Gradient<T>&grad_x_, &grad_y_;
};

// Compare `count` sets of `rows` rows in full. Row r of set b is row b * step + r * stride of all rows.
template <typename T>
double run_blocks(int64_t count, int64_t rows, int64_t step, int64_t stride, const Operand<T>& x, const Operand<T>& y,
                  double coefficient, Form form, Gradient<T>& grad_x, Gradient<T>& grad_y) {
  const auto rows_of = [&](const Operand<T>& all, int64_t b) {
    return Operand<T>{{all.rows.at(b * step, 0), stride * all.rows.row, all.rows.col}, all.width};
  };
  const auto gradient_of = [&](const Gradient<T>& all, int64_t b) {
    return Gradient<T>{all.data ? all.data + b * step * all.line : nullptr, stride * all.line, all.written};
  };
  Buffer<double> losses(count);
  parallel_blocks(count, 1, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      Gradient<T> own_x = gradient_of(grad_x, b), own_y = gradient_of(grad_y, b);
      losses.data()[b] = Block<T>(rows, rows_of(x, b), rows_of(y, b), coefficient, own_x, own_y).run(form);
    }
  });
  grad_x.written = grad_y.written = true;
  return std::accumulate(losses.data(), losses.data() + count, 0.0);
}

// c * Σ (‖x_r‖² − ‖y_r‖²)².
template <typename T>
double run_diagonal(int64_t rows, const Operand<T>& x, const Operand<T>& y, double coefficient, Gradient<T>& grad_x,
                    Gradient<T>& grad_y) {
  const auto add = [](const Operand<T>& operand, int64_t r, T factor, const Gradient<T>& gradient) {
    if (!gradient.data) return;
    T* out = gradient.data + r * gradient.line;
    const T* row = operand.rows.at(r, 0);
    for (int64_t j = 0; j < operand.width; ++j) out[j] = (gradient.written ? out[j] : T(0)) + factor * row[j];
  };
  Buffer<double> losses(rows);
  parallel_blocks(rows, 1, 1 + (1 << 14) / (x.width + y.width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const double difference = sum_squares(x.rows.at(r, 0), x.width) - sum_squares(y.rows.at(r, 0), y.width);
      losses.data()[r] = difference * difference;
      add(x, r, T(4 * coefficient * difference), grad_x);
      add(y, r, T(-4 * coefficient * difference), grad_y);
    }
  });
  grad_x.written = grad_y.written = true;
  return coefficient * std::accumulate(losses.data(), losses.data() + rows, 0.0);
}

}  // namespace

template <typename T>
double Congruence<T>::run(T* grad_x_data, T* grad_y_data) const {
  const Operand<T> own_x{x, width_x}, own_y{y, width_y};
  Gradient<T> grad_x{grad_x_data, width_x}, grad_y{grad_y_data, width_y};
  const Coefficients& c = coefficients;
  const int64_t images = rows / positions;
  double loss = 0;
  if (c.full != 0 && plan.full == Form::gram) {
    std::vector<Target<T>> targets;
    if (grad_x.data) targets.push_back({own_x, &grad_x, T(4 * c.full)});
    if (grad_y.data) targets.push_back({own_y, &grad_y, T(-4 * c.full)});
    loss = Strips<T>(rows, {{{&own_x, &own_y}}}, std::move(targets)).run(Relations<T>{c, positions});
  } else {
    if (c.full != 0) loss += Block<T>(rows, own_x, own_y, c.full, grad_x, grad_y).run(plan.full);
    if (c.intra != 0)
      loss += run_blocks(images, positions, positions, 1, own_x, own_y, c.intra, plan.intra, grad_x, grad_y);
    if (c.inter_same != 0)
      loss += run_blocks(positions, images, 1, positions, own_x, own_y, c.inter_same, plan.inter_same, grad_x, grad_y);
    if (c.diagonal != 0) loss += run_diagonal(rows, own_x, own_y, c.diagonal, grad_x, grad_y);
  }
  if (grad_x.data && !grad_x.written) std::fill_n(grad_x.data, rows * width_x, T(0));
  if (grad_y.data && !grad_y.written) std::fill_n(grad_y.data, rows * width_y, T(0));
  return loss;
}

template double Congruence<float>::run(float*, float*) const;
template double Congruence<double>::run(double*, double*) const;

std::tuple<Tensor, Tensor, Tensor> congruence(const Tensor& rows_x, const Tensor& rows_y, int64_t positions,
                                              const std::vector<double>& coefficients, const std::vector<int64_t>& plan,
                                              bool want_x, bool want_y, bool) {
  check_congruence(rows_x, rows_y, positions, coefficients, plan, want_y);
  const auto with_contiguous_rows = [](const Tensor& rows) {
    return rows.stride(1) == 1 ? rows : torch::stable::contiguous(rows);
  };
  const Tensor x = with_contiguous_rows(rows_x), y = with_contiguous_rows(rows_y);
  return with_compute_type(x, [&](auto type) {
    using T = decltype(type);
    const auto view = [](const Tensor& rows) {
      return View<T>{rows.const_data_ptr<T>(), rows.stride(0), rows.stride(1)};
    };
    const auto gradient = [](const Tensor& rows, bool wanted) {
      return wanted ? new_compact(rows, {rows.size(0), rows.size(1)}) : new_compact(rows, {0});
    };
    const Tensor grad_x = gradient(x, want_x), grad_y = gradient(y, want_y);
    const Congruence<T> problem{view(x),
                                view(y),
                                x.size(0),
                                x.size(1),
                                y.size(1),
                                positions,
                                coefficients_of(coefficients.data()),
                                plan_of(plan.data())};
    const double loss =
        problem.run(want_x ? grad_x.mutable_data_ptr<T>() : nullptr, want_y ? grad_y.mutable_data_ptr<T>() : nullptr);
    return std::make_tuple(new_scalar<T>(x, loss), grad_x, grad_y);
  });
}

}  // namespace kdkernels

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  // coefficients: the factors of four sums, over all pairs, pairs of one image, pairs of one position, and the diagonal. plan:
  // three form codes.
  m.def(
      "congruence(Tensor x, Tensor y, int positions, float[] coefficients, int[] plan, bool grad_x, bool grad_y,"
      " bool tf32=False) -> (Tensor loss, Tensor grad_x, Tensor grad_y)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) { m.impl("congruence", TORCH_BOX(&kdkernels::congruence)); }
