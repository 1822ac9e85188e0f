#include "congruence.h"

#include <limits>

#include "../checks/congruence.h"
#include "reduce.cuh"

namespace kdkernels {
namespace {

// A strip has at most an eighth of the matrix of all pairs. It has at least the first and at most the second of these
// numbers of entries.
constexpr int64_t kFewestEntries = int64_t(1) << 20, kMostEntries = int64_t(1) << 24;
constexpr int kWhole = std::numeric_limits<int>::max() - kTile;  // a depth that is not split

int64_t most_entries(int64_t pairs) { return std::clamp(pairs / 8, kFewestEntries, kMostEntries); }

template <typename T>
Matrix<T> matrix(const T* data, int64_t stride, std::initializer_list<int64_t> sizes) {
  constexpr int64_t together = 16 / sizeof(T);
  bool vectors = reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % together == 0 && is_short(stride);
  for (const int64_t size : sizes) vectors = vectors && size % together == 0;
  return {data, stride, vectors};
}

template <typename T, typename E>
Matrix<E> rows_of(const Side<T, E>& side, const Sets& sets) {
  return matrix(side.rows, sets.stride * side.width, {side.width, sets.step * side.width});
}

template <typename T>
Side<T> from(const Side<T>& side, int64_t row) {
  const int64_t offset = row * side.width;
  return {side.rows + offset, side.width, side.grad ? side.grad + offset : nullptr, nullptr};
}

}  // namespace

template <typename T, typename E>
T* Congruences<T, E>::new_memory(int64_t count) {
  memory_.push_back(new_compact(like_, {count}, kScalarType<T>));
  return data_of<T>(memory_.back());
}

template <typename T, typename E>
void Congruences<T, E>::add(int64_t rows, int64_t positions, const Side<T, E>& x, const Side<T, E>& y,
                            const Coefficients& c, const Plan& plan) {
  if constexpr (kIsHalf<E>)
    add_kernel(rows, x, y, {Metric::bilinear, 0, 0, 0, int(positions), int(x.width), int(y.width), c});
  else
    add_sums(rows, positions, x, y, c, plan);
}

template <typename T, typename E>
void Congruences<T, E>::add_sums(int64_t rows, int64_t positions, const Side<T>& x, const Side<T>& y,
                                 const Coefficients& c, const Plan& plan) {
  const int64_t images = rows / positions;
  const Sets all{1, rows, 0, 1}, by_image{images, positions, positions, 1},
      by_position{positions, images, 1, positions};
  next_ = 0;
  written_ = false;
  const auto add_sum = [&](const Sets& sets, double coefficient, Form form) {
    if (coefficient == 0) return;
    if (form == Form::gram)
      add_gram(sets, 1, x, y, {coefficient, 0, 0, 0});
    else
      add_feature(sets, x, y, coefficient);
  };
  if (c.full != 0 && plan.full == Form::gram) {
    add_gram(all, positions, x, y, c);
  } else {
    add_sum(all, c.full, plan.full);
    add_sum(by_image, c.intra, plan.intra);
    add_sum(by_position, c.inter_same, plan.inter_same);
    if (c.diagonal != 0) add_diagonal(rows, x, y, c.diagonal);
  }
  if (!written_ && (x.grad || y.grad)) add_diagonal(rows, x, y, 0);  // gradients of 0
}

// Strips of rows of D, with the columns from the diagonal on. The rows of a strip get S X. The rows below it get Sᵀ X.
template <typename T, typename E>
void Congruences<T, E>::add_gram(const Sets& sets, int64_t positions, const Side<T>& x, const Side<T>& y,
                                 const Coefficients& weights) {
  const int64_t size = sets.size;
  const bool wanted = x.grad || y.grad;
  const int64_t entries = most_entries(sets.count * size * sets.count * size);
  int64_t height = size, at_a_time = sets.count;
  if (wanted) {
    at_a_time = std::clamp<int64_t>(entries / (size * size), 1, sets.count);
    if (size * size > entries) height = std::max<int64_t>(entries / size / kTile, 1) * kTile;
  }
  T* const strip = wanted ? new_memory(at_a_time * height * size) : nullptr;
  const Matrix<T> rows_x = rows_of(x, sets), rows_y = rows_of(y, sets);

  for (int64_t set = 0; set < sets.count; set += at_a_time) {
    const int64_t count = std::min(at_a_time, sets.count - set), first_row = set * sets.step;
    for (int64_t first = 0; first < size; first += height) {
      Round& now = round(next_++);
      const int64_t lines = std::min(height, size - first), columns = size - first;
      const int64_t blocks = count * triangle(tiles(lines), tiles(columns));
      Gram<T> gram{rows_x.from(first_row * x.width), rows_y.from(first_row * y.width)};
      gram.batch_x = sets.step * x.width;
      gram.batch_y = sets.step * y.width;
      gram.width_x = int(x.width);
      gram.width_y = int(y.width);
      gram.first = int(first);
      gram.height = int(lines);
      gram.rows = int(size);
      gram.positions = int(positions);
      gram.weights = weights;
      gram.strip = strip;
      gram.batch_strip = lines * columns;
      gram.partials = new_parts(blocks);
      gram.tf32 = tf32_;
      now.grams.push_back({gram, blocks});

      for (const auto& [side, scale] : {std::pair(x, T(4)), std::pair(y, T(-4))})
        if (side.grad) add_gradient(now, sets, {strip, first, lines, columns, count}, from(side, first_row), scale);
    }
  }
  written_ = written_ || wanted;
}

template <typename T, typename E>
void Congruences<T, E>::add_gradient(Round& now, const Sets& sets, const Strip& strip, const Side<T, E>& side,
                                     T scale) {
  const auto [entries, first, lines, columns, count] = strip;
  const Matrix<T> S = matrix(static_cast<const T*>(entries), columns, {columns, lines, lines * columns});
  const Matrix<E> rows = rows_of(side, sets).from(first * sets.stride * side.width);
  T* const grad = side.grad + first * sets.stride * side.width;
  Product<T, E> product{{S, S}, {rows, rows}, {lines * columns, 0}, {sets.step * side.width, 0}, {int(columns), 0}};
  product.rows = int(lines);
  product.columns = int(side.width);
  product.splits = 1;
  product.split_depth = kWhole;
  product.out = grad;
  product.line = sets.stride * side.width;
  product.batch_out = sets.step * side.width;
  product.scale = scale;
  product.accumulate = written_ || first > 0;
  product.tf32 = tf32_;
  now.gradients.push_back({product, count * tiles(lines) * tiles(side.width)});
  if (lines == columns) return;
  product.a[0] = S.from(lines);
  product.depth[0] = int(lines);
  product.rows = int(columns - lines);
  product.out = grad + lines * product.line;
  now.transposed.push_back({product, count * tiles(columns - lines) * tiles(side.width)});
}

template <typename T, typename E>
void Congruences<T, E>::add_kernel(int64_t rows, const Side<T, E>& x, const Side<T, E>& y,
                                   const Comparison<T, E>& kernel) {
  next_ = 0;
  written_ = false;
  const Sets all{1, rows, 0, 1};
  const bool wanted = x.grad || y.grad;
  const int64_t entries = most_entries(rows * rows);
  const int64_t height = wanted && rows * rows > entries ? std::max<int64_t>(entries / rows / kTile, 1) * kTile : rows;
  T* const strip_x = x.grad ? new_memory(height * rows) : nullptr;
  T* const strip_y = y.grad ? new_memory(height * rows) : nullptr;
  for (int64_t first = 0; first < rows; first += height) {
    Round& now = round(next_++);
    const int64_t lines = std::min(height, rows - first), columns = rows - first;
    const int64_t blocks = triangle(tiles(lines), tiles(columns));
    Comparison<T, E> comparison = kernel;
    comparison.x = matrix(x.rows, x.width, {kernel.width_x});
    comparison.y = matrix(y.rows, y.width, {kernel.width_y});
    comparison.factors_x = x.factors;
    comparison.factors_y = y.factors;
    comparison.first = int(first);
    comparison.height = int(lines);
    comparison.rows = int(rows);
    comparison.strip_x = strip_x;
    comparison.strip_y = strip_y;
    comparison.partials = new_parts(blocks);
    comparison.tf32 = tf32_;
    now.comparisons.push_back({comparison, blocks});
    if (x.grad) add_gradient(now, all, {strip_x, first, lines, columns, 1}, x, 4);
    if (y.grad) add_gradient(now, all, {strip_y, first, lines, columns, 1}, y, -4);
  }
}

// c (‖XᵀX‖² + ‖YᵀY‖² - 2 ‖YᵀX‖²), with the gradients 4 c (X (XᵀX) - Y (YᵀX)) and 4 c (Y (YᵀY) - X (XᵀY)).
template <typename T, typename E>
void Congruences<T, E>::add_feature(const Sets& sets, const Side<T>& x, const Side<T>& y, double coefficient) {
  const int64_t widest = std::max(x.width, y.width);
  const int64_t at_a_time = std::clamp<int64_t>(kMostEntries / 4 / (widest * widest), 1, sets.count);
  for (int64_t set = 0; set < sets.count; set += at_a_time) {
    Round& now = round(next_++);
    const Sets part{std::min(at_a_time, sets.count - set), sets.size, sets.step, sets.stride};
    const Side<T> own_x = from(x, set * sets.step), own_y = from(y, set * sets.step);
    T* of_x = nullptr;
    const T* P = add_norm(now, part, own_x, own_x, coefficient, x.grad, nullptr);
    const T* Q_y = add_norm(now, part, own_y, own_y, coefficient, y.grad, nullptr);
    const T* Q = add_norm(now, part, own_y, own_x, -2 * coefficient, x.grad, y.grad ? &of_x : nullptr);

    const auto add_gradient = [&](const Side<T>& own, const T* own_product, const Side<T>& other, const T* cross) {
      if (!own.grad) return;
      Product<T> product{{rows_of(own, part), rows_of(other, part)},
                         {matrix(own_product, own.width, {own.width * own.width}),
                          matrix(cross, own.width, {own.width * other.width})},
                         {part.step * own.width, part.step * other.width},
                         {own.width * own.width, other.width * own.width},
                         {int(own.width), int(other.width)}};
      product.rows = int(part.size);
      product.columns = int(own.width);
      product.splits = 1;
      product.split_depth = kWhole;
      product.out = own.grad;
      product.line = part.stride * own.width;
      product.batch_out = part.step * own.width;
      product.scale = T(4 * coefficient);
      product.accumulate = written_;
      now.gradients.push_back({product, part.count * tiles(part.size) * tiles(own.width)});
    };
    add_gradient(own_x, P, own_y, Q);
    add_gradient(own_y, Q_y, own_x, of_x);
  }
  written_ = written_ || x.grad || y.grad;
}

// c ‖AᵀB‖². Returns AᵀB if it is kept, and its transpose if the caller asks for it.
template <typename T, typename E>
T* Congruences<T, E>::add_norm(Round& now, const Sets& sets, const Side<T>& a, const Side<T>& b, double coefficient,
                               bool keep, T** transposed) {
  const bool symmetric = a.rows == b.rows;
  const int64_t size = a.width * b.width, lines = tiles(a.width), across = tiles(b.width);
  const int64_t each = symmetric ? triangle(int(lines), int(across)) : lines * across;
  const Tuning tuned = tuning();
  const int64_t splits = std::clamp<int64_t>(tuned.product_blocks / (sets.count * each), 1,
                                             (sets.size + tuned.product_depth - 1) / tuned.product_depth);
  T* const parts = new_memory(sets.count * splits * size);
  Product<T> product{{rows_of(a, sets), rows_of(a, sets)},
                     {rows_of(b, sets), rows_of(b, sets)},
                     {sets.step * a.width, 0},
                     {sets.step * b.width, 0},
                     {int(sets.size), 0}};
  product.rows = int(a.width);
  product.columns = int(b.width);
  product.symmetric = symmetric;
  product.splits = int(splits);
  product.split_depth = int(((sets.size + splits - 1) / splits + kDepth - 1) / kDepth * kDepth);
  product.out = parts;
  product.line = b.width;
  product.batch_out = size;
  product.scale = T(1);
  now.products.push_back({product, sets.count * splits * each});

  const int64_t blocks = (sets.count * size + kFoldThreads * kFoldEach - 1) / (kFoldThreads * kFoldEach);
  Fold<T> fold{parts, int(splits), int(a.width), int(b.width), symmetric, coefficient};
  fold.out = keep ? new_memory(sets.count * size) : nullptr;
  if (transposed) fold.transposed = *transposed = new_memory(sets.count * size);
  fold.batch = int(sets.count);
  fold.partials = new_parts(blocks);
  now.folds.push_back({fold, blocks});
  return fold.out;
}

template <typename T, typename E>
void Congruences<T, E>::add_diagonal(int64_t rows, const Side<T>& x, const Side<T>& y, double coefficient) {
  const Sets all{1, rows, 0, 1};
  Diagonal<T> diagonal{rows_of(x, all), rows_of(y, all), int(x.width), int(y.width), coefficient, x.grad, y.grad};
  diagonal.accumulate = written_;
  diagonal.partials = new_parts(rows);
  round(next_++).diagonals.push_back({diagonal, rows});
  written_ = true;
}

template <typename T, typename E>
void Congruences<T, E>::run() {
  parts_ = new_compact(like_, {parts_count_}, ScalarType::Double);
  double* const parts = data_of<double>(parts_);
  for (const Round& now : rounds_) {
    launch(gram_kernel<T>, now.grams, kTileThreads, kTileBytes<T, true, true>, device_.stream, parts);
    launch(comparison_kernel<T, E>, now.comparisons, kTileThreads, kComparisonBytes<T, E>, device_.stream, parts);
    launch(product_kernel<T, false>, now.products, kTileThreads, kTileBytes<T, false, false>, device_.stream);
    launch(fold_kernel<T>, now.folds, kFoldThreads, 0, device_.stream, parts);
    launch(product_kernel<T, true, E>, now.gradients, kTileThreads, kTileBytes<T, true, false, T, E>, device_.stream);
    launch(product_kernel<T, false, E>, now.transposed, kTileThreads, kTileBytes<T, false, false, T, E>,
           device_.stream);
    launch(diagonal_kernel<T>, now.diagonals, kDiagonalThreads, 0, device_.stream, parts);
  }
  rounds_.clear();
}

template class Congruences<float>;
template class Congruences<double>;
#define OF_HALF_PRECISION(E)                                                                               \
  template void Congruences<float, E>::add(int64_t, int64_t, const Side<float, E>&, const Side<float, E>&, \
                                           const Coefficients&, const Plan&);                              \
  template void Congruences<float, E>::add_kernel(int64_t, const Side<float, E>&, const Side<float, E>&,   \
                                                  const Comparison<float, E>&);                            \
  template void Congruences<float, E>::run();
OF_HALF_PRECISION(BFloat16)
OF_HALF_PRECISION(Half)
#undef OF_HALF_PRECISION

std::tuple<Tensor, Tensor, Tensor> congruence(const Tensor& rows_x, const Tensor& rows_y, int64_t positions,
                                              const std::vector<double>& coefficients, const std::vector<int64_t>& plan,
                                              bool want_x, bool want_y, bool tf32) {
  check_congruence(rows_x, rows_y, positions, coefficients, plan, want_y);
  const OnDevice device(rows_x);
  const Tensor x = torch::stable::contiguous(rows_x), y = torch::stable::contiguous(rows_y);
  return with_compute_type(x, [&](auto type) {
    using T = decltype(type);
    const auto gradient = [](const Tensor& rows, bool wanted) {
      return wanted ? new_compact(rows, {rows.size(0), rows.size(1)}) : new_compact(rows, {0});
    };
    const Tensor loss = new_compact(x, {}), grad_x = gradient(x, want_x), grad_y = gradient(y, want_y);
    Congruences<T> problem(device, x, tf32);
    problem.add(x.size(0), positions, {x.const_data_ptr<T>(), x.size(1), data_of<T>(grad_x), nullptr},
                {y.const_data_ptr<T>(), y.size(1), data_of<T>(grad_y), nullptr}, coefficients_of(coefficients.data()),
                plan_of(plan.data()));
    problem.run();
    launch(reduce_kernel<T>, 1, kReduceThreads, 0, device.stream, problem.part_data(), problem.parts(), 1.0,
           data_of<T>(loss));
    return std::make_tuple(loss, grad_x, grad_y);
  });
}

}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(KDKERNELS_NAMESPACE, KDKERNELS_DEVICE, m) {
  m.impl("congruence", TORCH_BOX(&kdkernels::congruence));
}
