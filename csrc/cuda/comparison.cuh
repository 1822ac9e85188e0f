// Sums of squared differences between two kernel matrices, with gradients. The tiles of both Gram matrices become
// kernel entries while they are in registers. Half-precision rows are multiplied as they are. Their norms are applied
// here.
#pragma once

#include "congruence.cuh"

namespace kdkernels {

enum class Metric : int { taylor_rbf = 0, rbf = 1, bilinear = 2, mmd = 3 };

// A kernel entry, computed from a product g of two rows, and its derivative with respect to g.
template <typename T>
struct Entry {
  T value, slope;
};

// exp(−2γ) Σ (2γ)^p / p! g^p over p = 1, ..., order, by Horner's rule. The term p = 0 is the same for all entries and
// cancels.
template <typename T>
__device__ Entry<T> taylor_rbf(T g, T gamma, T constant, int order) {
  if (order == 0) return {0, 0};
  T series = 1, slope = 0;
#pragma unroll 1  // orders are low, and there are many entries
  for (int p = order; p > 1; --p) {
    const T ratio = 2 * gamma * fast_reciprocal(T(p));
    slope = ratio * (series + g * slope);
    series = 1 + ratio * g * series;
  }
  const T ratio = 2 * gamma * constant;
  return {ratio * g * series, ratio * (series + g * slope)};
}

// exp(−γ ‖a − b‖²) of rows whose squares are known. The derivative with respect to a is the derivative with respect to
// g, times b − a.
template <typename T>
__device__ Entry<T> rbf(T g, T gamma, T square, T other_square) {
  const T distance = square + other_square - 2 * g;
  const T value = exp(-gamma * (distance < 0 ? T(0) : distance));
  return {value, 2 * gamma * value};
}

// Like Gram in congruence.cuh: rows first to first + height of both matrices, from column first on. The rows have
// numbers E.
template <typename T, typename E = T>
struct Comparison {
  Metric metric;
  T gamma, constant;  // exp(−2γ)
  int order, positions, width_x, width_y;
  PairWeights<T> weights;
  const T *terms_x, *terms_y;      // squares of the rows, for rbf
  const T *factors_x, *factors_y;  // for half precision, the factors that give rows their norm
  Matrix<E> x, y;
  int first, height, rows;
  // The difference times its weight, the slope of the kernel and, for half precision, the factors of row and column:
  // height x (rows - first). Null if it is not wanted.
  T *strip_x, *strip_y;
  int64_t partials;
  bool tf32;
};

template <typename T, typename E = T>
inline constexpr int kComparisonBytes = kTileBytes<T, true, true, E> + kTile * kTile * int(sizeof(T));

template <typename T, typename E>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<T>)
    comparison_kernel(const __grid_constant__ Group<Comparison<T, E>> group, double* partials) {
  static_assert(kComparisonBytes<T, E> <= 99 * 1024);  // the smallest limit of a block, on sm_86 and sm_89
  const int index = group.index();
  const Comparison<T, E>& p = group.problems[index];
  const int columns = p.rows - p.first, across = (columns + kTile - 1) / kTile;
  const Place place = Place::in_triangle(group.block(index), across);
  const Matrix<E> x = p.x.from(p.first * p.x.stride), y = p.y.from(p.first * p.y.stride);
  const auto products = [&](const Matrix<E>& rows, int width) {
    const auto term = [&](int) { return Term<Matrix<E>>{rows, rows, 0, width}; };
    return multiply_tiles<T, true, true, 1>(term, place.row, p.height, place.column, columns, p.tf32);
  };
  // One tile waits in shared memory, behind the panels, while the other is computed. Registers have no room for both.
  T* const waiting = reinterpret_cast<T*>(dynamic_shared_memory() + kTileBytes<T, true, true, E>) + threadIdx.x;
  Tile<T> of_x = products(x, p.width_x);
  int place_of = 0;
  of_x.for_each([&](int, int, T& value) { waiting[place_of++ * kTileThreads] = value; });
  __syncthreads();  // the panels' memory is used again
  Tile<T> of_y = products(y, p.width_y);

  const bool on_diagonal = place.row == place.column;
  const Metric metric = p.metric;
  const T gamma = p.gamma, constant = p.constant;
  const int order = p.order, first = p.first, height = p.height;
  const T *const terms_x = p.terms_x, *const terms_y = p.terms_y;
  const T *const factors_x = p.factors_x, *const factors_y = p.factors_y;
  T *const strip_x = p.strip_x, *const strip_y = p.strip_y;
  const PairWeights<T> weights = p.weights;
  const Patches<T> patches(first + place.row, first + place.column, p.positions);
  const auto factor = [](const T* factors, int row, int column) {
    return kIsHalf<E> ? factors[row] * factors[column] : T(1);
  };
  const auto entry = [&](T g, const T* terms, int row, int column) {
    if (metric == Metric::bilinear) return Entry<T>{g, 1};
    if (metric == Metric::taylor_rbf) return taylor_rbf(g, gamma, constant, order);
    if (row == column) return Entry<T>{1, 0};  // the distance of a row to itself has no gradient
    return rbf(g, gamma, terms[row], terms[column]);
  };
  T sum = 0;
  place_of = 0;
  of_y.for_each([&](int i, int j, T& product) {
    const T other = waiting[place_of++ * kTileThreads];
    const int r = place.row + of_y.row(i), s = place.column + of_y.column(j);
    if (r >= height || s >= columns) return;
    const int row = first + r, column = first + s;
    const T factor_x = factor(factors_x, row, column), factor_y = factor(factors_y, row, column);
    const Entry<T> a = entry(other * factor_x, terms_x, row, column);
    const Entry<T> b = entry(product * factor_y, terms_y, row, column);
    const T difference = a.value - b.value;
    const T weighted = weights.between(patches.rows[i], patches.columns[j]) * difference;
    sum += weighted * difference;
    const auto store = [&](T* strip, T value) {
      if (!strip) return;
      strip[int64_t(r) * columns + s] = value;
      if (!on_diagonal && s < height) strip[int64_t(s) * columns + r] = value;
    };
    store(strip_x, weighted * a.slope * factor_x);
    store(strip_y, weighted * b.slope * factor_y);
  });
  const double of_block = block_reduce((on_diagonal ? 1 : 2) * double(sum), Sum<double>());
  if (threadIdx.x == 0) partials[p.partials + group.block(index)] = of_block;
}

}  // namespace kdkernels
