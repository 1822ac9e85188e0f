// The whole SP loss in one call. r_i and s_i are the inverse norms of the rows of G = X Xᵀ and H = Y Yᵀ. The loss sums 2 − 2
// cos_i with cos_i = r_i s_i (G_i · H_i). The row of the gradient with respect to G is 2 (cos_i r_i² G_i − r_i s_i H_i).
// Because G is symmetric, its column gets the same. For similar networks these terms nearly cancel. If the entries of both matrices are
// available, the kernel uses 2 r_i ((r_i G_i − s_i H_i) − (1 − cos_i) r_i G_i).
#include <vector>

#include "../checks/similarity_preserving.h"
#include "rows.h"
#include "strips.h"
#include "tensors.h"
#include "workspace.h"

namespace kdkernels {
namespace {

constexpr double kEps = 1e-12;   // a row of similarities with this norm or less is zero
constexpr int64_t kWhole = 512;  // up to this number of samples, the Gram matrices are computed once and kept

// Per row of both Gram matrices: the inverse norms, and the factors of G and H in both forms of the gradients.
template <typename T>
struct RowFactors {
  std::vector<T> inverse_x, inverse_y, own_x, own_y, cross, defect_x, defect_y;
  std::vector<double> cosines;
  double alive = 0;  // the number of rows that are not zero, in either matrix

  // Compute them from the sums of squares of the rows and of their products.
  RowFactors(const std::vector<double>& xx, const std::vector<double>& yy, const std::vector<double>& xy) {
    const int64_t rows = xx.size();
    for (auto* numbers : {&inverse_x, &inverse_y, &own_x, &own_y, &cross, &defect_x, &defect_y}) numbers->resize(rows);
    cosines.resize(rows);
    for (int64_t i = 0; i < rows; ++i) {
      // Squares beyond the range of T make the row NaN, not zero.
      const auto inverse = [](double squares) {
        return std::sqrt(squares) <= kEps ? 0 : squares < HUGE_VAL ? 1 / std::sqrt(squares) : NAN;
      };
      const double r = inverse(xx[i]), s = inverse(yy[i]);
      alive += (r != 0) + (s != 0);
      cosines[i] = r * s * xy[i];
      inverse_x[i] = T(r);
      inverse_y[i] = T(s);
      cross[i] = T(r * s);
      own_x[i] = T(cosines[i] * r * r);
      own_y[i] = T(cosines[i] * s * s);
      // (1 - cos) r² from the rounded norms. Their error is a multiple of the row, which must cancel.
      const double x = inverse_x[i], y = inverse_y[i];
      defect_x[i] = T(x != 0 ? x * x - x * y * xy[i] / xx[i] : 0);
      defect_y[i] = T(y != 0 ? y * y - x * y * xy[i] / yy[i] : 0);
    }
  }
};

// The loss of one row, and its contribution to the gradients of G and H.
template <typename T>
struct Similarity {
  const RowFactors<T>& rows;
  bool grad_x, grad_y;

  double operator()(int64_t r, int64_t length, const std::array<T*, 2>& entries) const {
    using V = typename Vec<T>::type;
    const auto [of_x, of_y] = entries;
    const T x = rows.inverse_x[r], y = rows.inverse_y[r];
    const T own_first = of_x[0] * x - of_y[0] * y;
    const double total = sum_vectors<T>(0, length, [&](int64_t j, int64_t count) {
      const auto of_rows = [&](const std::vector<T>& numbers) {
        return load_first<T>(numbers.data() + r + j, count, 0);
      };
      const V g = load_first<T>(of_x + j, count, 0), h = load_first<T>(of_y + j, count, 0);
      const V their_x = of_rows(rows.inverse_x), their_y = of_rows(rows.inverse_y);
      const V mine = x * g - y * h, theirs = their_x * g - their_y * h;
      if (grad_x)
        store_first<T>(of_x + j, x * mine + their_x * theirs - (rows.defect_x[r] + of_rows(rows.defect_x)) * g, count);
      if (grad_y)
        store_first<T>(of_y + j, -(y * mine + their_y * theirs + (rows.defect_y[r] + of_rows(rows.defect_y)) * h),
                       count);
      return mine * mine + theirs * theirs;
    });
    return total - double(own_first) * own_first;
  }
};

template <typename T>
struct Problem {
  int64_t rows;
  Operand<T> x, y;
  double scale;
  Gradient<T> grad_x, grad_y;

  double gram_form() {
    std::vector<Target<T>> targets;
    if (grad_x.data) targets.push_back({x, &grad_x, T(2 * scale), 0});
    if (grad_y.data) targets.push_back({y, &grad_y, T(2 * scale), 1});
    const int64_t height = rows <= kWhole ? rows : strip_height(rows);
    Strips<T, 2> strips(rows, height, {{{&x, nullptr}, {&y, nullptr}}}, std::move(targets));
    std::vector<double> xx(rows), yy(rows), xy(rows);
    strips.for_each([&](const Strip<T, 2>& strip) {
      const auto add = [&](std::vector<double>& sums, int64_t a, int64_t b) {
        strip.add_row_sums(sums.data() + strip.begin, 1, [=](const auto& at, int64_t count) {
          return load_first<T>(at[a], count, 0) * load_first<T>(at[b], count, 0);
        });
      };
      add(xx, 0, 0);
      add(yy, 1, 1);
      add(xy, 0, 1);
    });
    const RowFactors<T> of_rows(xx, yy, xy);
    return scale * strips.run(Similarity<T>{of_rows, grad_x.data != nullptr, grad_y.data != nullptr});
  }

  // The same sums as x_iᵀ (XᵀX) x_i, y_iᵀ (YᵀY) y_i and x_iᵀ (XᵀY) y_i.
  double feature_form() {
    const Buffer<T> gram_x = product(x, x), gram_y = product(y, y), cross = product(x, y);
    const Buffer<T> of_x = times(x, gram_x, x.width), of_y = times(y, gram_y, y.width),
                    across = times(x, cross, y.width);
    std::vector<double> xx(rows), yy(rows), xy(rows);
    parallel_blocks(rows, 1, 1 + (1 << 14) / (x.width + y.width), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        xx[i] = dot(of_x.data() + i * x.width, x.rows.at(i, 0), x.width);
        yy[i] = dot(of_y.data() + i * y.width, y.rows.at(i, 0), y.width);
        xy[i] = dot(across.data() + i * y.width, y.rows.at(i, 0), y.width);
      }
    });
    const RowFactors<T> of_rows(xx, yy, xy);
    if (grad_x.data) add_gradient(x, y, of_x, {cross.data(), y.width, 1}, of_rows.own_x, of_rows.cross, grad_x);
    if (grad_y.data)
      add_gradient(y, x, of_y, View<T>{cross.data(), y.width, 1}.transposed(), of_rows.own_y, of_rows.cross, grad_y);
    return scale * (of_rows.alive - 2 * std::accumulate(of_rows.cosines.begin(), of_rows.cosines.end(), 0.0));
  }

 private:
  Buffer<T> product(const Operand<T>& a, const Operand<T>& b) const {
    Buffer<T> result(a.width * b.width);
    gemm<T>(a.width, b.width, rows, a.rows.transposed(), b.rows, result.data(), b.width);
    return result;
  }

  Buffer<T> times(const Operand<T>& a, const Buffer<T>& matrix, int64_t width) const {
    Buffer<T> result(rows * width);
    gemm<T>(rows, width, a.width, a.rows, {matrix.data(), width, 1}, result.data(), width);
    return result;
  }

  // 2 scale (diag(own) X XᵀX + X Xᵀ diag(own) X − diag(cross) Y YᵀX − Y Yᵀ diag(cross) X), `of_a` being X XᵀX and
  // `across` XᵀY.
  void add_gradient(const Operand<T>& a, const Operand<T>& b, const Buffer<T>& of_a, View<T> across,
                    const std::vector<T>& own, const std::vector<T>& cross, const Gradient<T>& gradient) const {
    const int64_t width = a.width;
    T* out = gradient.data;
    const Buffer<T> scaled(rows * width), inner(std::max(a.width, b.width) * width);
    const auto weigh = [&](const std::vector<T>& factors) {
      parallel_blocks(rows, 1, 1 + (1 << 14) / width, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          for (int64_t j = 0; j < width; ++j) scaled.data()[i * width + j] = factors[i] * *a.rows.at(i, j);
      });
    };
    const View<T> weighed{scaled.data(), width, 1}, matrix{inner.data(), width, 1};
    const T alpha = T(2 * scale);
    gemm<T>(rows, width, b.width, b.rows, across.transposed(), out, width);
    parallel_blocks(rows, 1, 1 + (1 << 14) / width, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t j = 0; j < width; ++j)
          out[i * width + j] = alpha * (own[i] * of_a.data()[i * width + j] - cross[i] * out[i * width + j]);
    });
    weigh(own);
    gemm<T>(width, width, rows, a.rows.transposed(), weighed, inner.data(), width);
    gemm<T>(rows, width, width, a.rows, matrix, out, width, {alpha, true});
    weigh(cross);
    gemm<T>(b.width, width, rows, b.rows.transposed(), weighed, inner.data(), width);
    gemm<T>(rows, width, b.width, b.rows, matrix, out, width, {-alpha, true});
  }
};

// Return whether every sample is dense in memory, in the order of its dimensions or in channels_last order.
bool dense(const Tensor& features, bool channels_last) {
  std::vector<int64_t> order(features.dim() - 1);
  std::iota(order.begin(), order.end(), 1);
  if (channels_last) order = {2, 3, 1};
  int64_t expected = 1;
  for (auto d = order.rbegin(); d != order.rend(); ++d) {
    if (features.size(*d) != 1 && features.stride(*d) != expected) return false;
    expected *= features.size(*d);
  }
  return true;
}

// The features of a network, one row per sample, in channels_last order if the memory has this order. Products of two samples
// do not depend on the order of their elements.
struct Samples {
  Tensor features;
  bool channels_last;
  int64_t width;

  explicit Samples(const Tensor& given)
      : features(given), channels_last(last(given)), width(given.numel() / given.size(0)) {
    if (dense(features, channels_last)) return;
    channels_last = false;
    if (!dense(features, false)) features = torch::stable::contiguous(features);
  }

  template <typename T, Scratch scratch>
  Operand<T> operand() const {
    const int64_t rows = features.size(0), stride = features.stride(0);
    if (features.scalar_type() == kScalarType<T>) return {{features.const_data_ptr<T>(), stride, 1}, width};
    T* copy = workspace<T, scratch>(rows * width);
    with_element_type(features, [&](auto type) {
      const auto* data = static_cast<const decltype(type)*>(features.const_data_ptr());
      parallel_blocks(rows, 1, 1 + (1 << 15) / width, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) widen(data + i * stride, 1, width, copy + i * width);
      });
    });
    return {{copy, width, 1}, width};
  }

  // In the memory order of the samples.
  template <typename T>
  Tensor new_gradient(bool wanted) const {
    using torch::headeronly::MemoryFormat;
    if (!wanted) return new_compact(features, {0}, kScalarType<T>);
    const auto sizes = features.sizes();
    return torch::stable::empty(std::vector<int64_t>(sizes.begin(), sizes.end()), kScalarType<T>, std::nullopt,
                                features.device(), std::nullopt,
                                channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  }

 private:
  static bool last(const Tensor& features) {
    return features.dim() == 4 && features.stride(1) == 1 && features.size(1) > 1 &&
           features.size(2) * features.size(3) > 1 && dense(features, true);
  }
};

template <typename T>
std::tuple<Tensor, Tensor, Tensor> run(const Tensor& student, const Tensor& teacher, double scale, bool feature,
                                       bool grad_student, bool grad_teacher) {
  const Samples students(student), teachers(teacher);
  const Tensor gradient_x = students.new_gradient<T>(grad_student), gradient_y = teachers.new_gradient<T>(grad_teacher);
  Problem<T> problem{student.size(0),
                     students.operand<T, Scratch::rows_x>(),
                     teachers.operand<T, Scratch::rows_y>(),
                     scale,
                     {grad_student ? gradient_x.mutable_data_ptr<T>() : nullptr, students.width},
                     {grad_teacher ? gradient_y.mutable_data_ptr<T>() : nullptr, teachers.width}};
  const double loss = feature ? problem.feature_form() : problem.gram_form();
  return {new_scalar<T>(student, loss), gradient_x, gradient_y};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> similarity_preserving(const Tensor& student, const Tensor& teacher, double scale,
                                                         bool feature, bool grad_student, bool grad_teacher) {
  check_similarity_preserving(student, teacher, scale, feature);
  const bool in_double = student.scalar_type() == ScalarType::Double || teacher.scalar_type() == ScalarType::Double;
  return (in_double ? run<double> : run<float>)(student, teacher, scale, feature, grad_student, grad_teacher);
}

}  // namespace kdkernels

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def(
      "similarity_preserving(Tensor student, Tensor teacher, float scale, bool feature, bool grad_student,"
      " bool grad_teacher) -> (Tensor loss, Tensor grad_student, Tensor grad_teacher)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("similarity_preserving", TORCH_BOX(&kdkernels::similarity_preserving));
}
