// Sums of squared differences between two Gram matrices, with gradients, in sample space or in feature space.
#pragma once

#include "group.cuh"
#include "tile.cuh"

namespace kdkernels {

// Factors of four sums of D²: over all pairs, over pairs of one image, over pairs of one position, and over the
// diagonal.
struct Coefficients {
  double full, intra, inter_same, diagonal;
};

// The image and the position of a row.
struct Patch {
  int image, position;

  Patch() = default;
  __device__ Patch(int row, int positions) : image(row / positions), position(row % positions) {}
};

// The factors of squared entries, for pairs that share nothing, the image, the position, or both.
template <typename T>
struct PairWeights {
  T other, intra, inter_same, diagonal;

  PairWeights() = default;
  PairWeights(const Coefficients& c)
      : other(T(c.full)),
        intra(T(c.full + c.intra)),
        inter_same(T(c.full + c.inter_same)),
        diagonal(T(c.full + c.intra + c.inter_same + c.diagonal)) {}

  __device__ T between(const Patch& a, const Patch& b) const {
    const T in_image = a.position == b.position ? diagonal : intra;
    const T elsewhere = a.position == b.position ? inter_same : other;
    return a.image == b.image ? in_image : elsewhere;
  }
};

// The patches of this thread's rows and columns.
template <typename T>
struct Patches {
  Patch rows[Tile<T>::kMyRows], columns[Tile<T>::kMyColumns];

  __device__ Patches(int first_row, int first_column, int positions) {
#pragma unroll
    for (int i = 0; i < Tile<T>::kMyRows; ++i) rows[i] = {first_row + Tile<T>::row(i), positions};
#pragma unroll
    for (int j = 0; j < Tile<T>::kMyColumns; ++j) columns[j] = {first_column + Tile<T>::column(j), positions};
  }
};

// Rows first to first + height of D = X Xᵀ - Y Yᵀ, from column first on. Matrices are `batch` numbers apart.
template <typename T>
struct Gram {
  Matrix<T> x, y;
  int64_t batch_x, batch_y;
  int width_x, width_y, first, height, rows, positions;
  PairWeights<T> weights;
  T* strip;  // D times its weights, [height][rows - first]; null if not wanted
  int64_t batch_strip, partials;
  bool tf32;
};

template <typename T>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<T>)
    gram_kernel(const __grid_constant__ Group<Gram<T>> group, double* partials) {
  const int index = group.index();
  const Gram<T>& p = group.problems[index];
  const int across = (p.rows - p.first + kTile - 1) / kTile, lines = (p.height + kTile - 1) / kTile;
  const int per_batch = int(triangle(lines, across)), batch = group.block(index) / per_batch;
  const Place place = Place::in_triangle(group.block(index) % per_batch, across);
  const int columns = p.rows - p.first;

  const auto term = [&](int i) {
    const Matrix<T>& all = i ? p.y : p.x;
    const Matrix<T> rows = all.from(batch * (i ? p.batch_y : p.batch_x) + p.first * all.stride);
    return Term<Matrix<T>>{rows, rows, 0, i ? p.width_y : p.width_x};
  };
  Tile<T> tile = multiply_tiles<T, true, true, 2>(term, place.row, p.height, place.column, columns, p.tf32);

  const bool on_diagonal = place.row == place.column;
  const int height = p.height;
  const PairWeights<T> weights = p.weights;
  const Patches<T> patches(p.first + place.row, p.first + place.column, p.positions);
  T* const strip = p.strip ? p.strip + batch * p.batch_strip : nullptr;
  T sum = 0;
  tile.for_each([&](int i, int j, T& entry) {
    const int r = place.row + tile.row(i), s = place.column + tile.column(j);
    if (r >= height || s >= columns) return;
    const T weighted = weights.between(patches.rows[i], patches.columns[j]) * entry;
    sum += weighted * entry;
    if (!strip) return;
    strip[int64_t(r) * columns + s] = weighted;
    if (!on_diagonal && s < height) strip[int64_t(s) * columns + r] = weighted;
  });
  // Entries below the diagonal are computed only within this tile and for rows of later strips. Entries above count
  // twice.
  const double of_block = block_reduce((on_diagonal ? 1 : 2) * double(sum), Sum<double>());
  if (threadIdx.x == 0) partials[p.partials + group.block(index)] = of_block;
}

// out = [out +] scale (A₁ B₁ - A₂ B₂). The product is split along its depth into parts. B has numbers E.
template <typename T, typename E = T>
struct Product {
  Matrix<T> a[2];
  Matrix<E> b[2];
  int64_t batch_a[2], batch_b[2];
  int depth[2], rows, columns;
  bool symmetric;  // compute only the tiles from the diagonal on
  int splits, split_depth;
  T* out;
  int64_t line, batch_out;  // batch_out: distance to the next part, if there are splits
  T scale;
  bool accumulate, tf32;
};

// Neighbours in memory lie along the depth or across it in A, and across it in B.
template <typename T, bool AlongA, typename E = T>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<T>)
    product_kernel(const __grid_constant__ Group<Product<T, E>> group) {
  const int index = group.index();
  const Product<T, E>& p = group.problems[index];
  const int lines = (p.rows + kTile - 1) / kTile, across = (p.columns + kTile - 1) / kTile;
  const int per_part = p.symmetric ? int(triangle(lines, lines)) : lines * across;
  const int part = group.block(index) / per_part, tile_index = group.block(index) % per_part;
  const int batch = part / p.splits, begin = part % p.splits * p.split_depth;
  const Place place = p.symmetric ? Place::in_triangle(tile_index, across)
                                  : Place{tile_index / across * kTile, tile_index % across * kTile};
  const auto term = [&](int i) {
    const int end = min(p.depth[i], begin + p.split_depth);
    return Term<Matrix<T>, Matrix<E>>{p.a[i].from(batch * p.batch_a[i]), p.b[i].from(batch * p.batch_b[i]), begin,
                                      max(begin, end)};
  };
  Tile<T> tile = multiply_tiles<T, AlongA, false, 2>(term, place.row, p.rows, place.column, p.columns, p.tf32);
  T* const out = p.out + part * p.batch_out;
  const int64_t line = p.line;
  const int rows = p.rows, columns = p.columns;
  const T scale = p.scale;
  const bool accumulate = p.accumulate;
  tile.for_each([&](int i, int j, T& entry) {
    const int r = place.row + tile.row(i), s = place.column + tile.column(j);
    if (r >= rows || s >= columns) return;
    T& result = out[r * line + s];
    result = scale * entry + (accumulate ? result : T(0));
  });
}

// The parts of split products: [batch][splits][rows][columns].
template <typename T>
struct Fold {
  const T* parts;
  int splits, rows, columns;
  bool symmetric;       // the parts have only the diagonal and what is right of it
  double coefficient;   // of the sum of squares
  T *out, *transposed;  // null if not wanted
  int batch;            // fewer than 2^31 lines in total
  int64_t partials;
};

// Adds the parts, and sums the squares.
template <typename T>
__global__ void __launch_bounds__(kFoldThreads)
    fold_kernel(const __grid_constant__ Group<Fold<T>> group, double* partials) {
  const int index = group.index();
  const Fold<T>& p = group.problems[index];
  const int64_t size = int64_t(p.rows) * p.columns, first = int64_t(group.block(index)) * kFoldEach * kFoldThreads;
  const int first_line = int(first / p.columns), first_column = int(first % p.columns), lines = p.batch * p.rows;
  double squares = 0;
  for (int e = 0; e < kFoldEach; ++e) {
    const int place = first_column + e * kFoldThreads + int(threadIdx.x);
    const int line = first_line + place / p.columns, s = place % p.columns;
    if (line >= lines) break;
    const int batch = line / p.rows, r = line % p.rows;
    const int64_t from = p.symmetric && r > s ? int64_t(s) * p.columns + r : int64_t(r) * p.columns + s;
    T sum = 0;
    for (int split = 0; split < p.splits; ++split) sum += p.parts[(int64_t(batch) * p.splits + split) * size + from];
    if (p.out) p.out[batch * size + int64_t(r) * p.columns + s] = sum;
    if (p.transposed) p.transposed[batch * size + int64_t(s) * p.rows + r] = sum;
    squares += double(sum) * double(sum);
  }
  squares = block_reduce(squares, Sum<double>());
  if (threadIdx.x == 0) partials[p.partials + group.block(index)] = p.coefficient * squares;
}

// c Σ (‖x_r‖² - ‖y_r‖²)² and its gradients. One block per row.
template <typename T>
struct Diagonal {
  Matrix<T> x, y;
  int width_x, width_y;
  double coefficient;
  T *grad_x, *grad_y;  // null if not wanted
  bool accumulate;
  int64_t partials;
};

template <typename T>
__global__ void __launch_bounds__(kDiagonalThreads)
    diagonal_kernel(const __grid_constant__ Group<Diagonal<T>> group, double* partials) {
  const int index = group.index();
  const Diagonal<T>& p = group.problems[index];
  const int64_t row = group.block(index);
  const auto squares = [&](const Matrix<T>& matrix, int width) {
    double sum = 0;
    for (int j = threadIdx.x; j < width; j += kDiagonalThreads) {
      const double value = matrix.data[row * matrix.stride + j];
      sum += value * value;
    }
    return block_reduce(sum, Sum<double>());
  };
  const double difference = squares(p.x, p.width_x) - squares(p.y, p.width_y);
  const auto add = [&](const Matrix<T>& matrix, int width, double slope, T* grad) {
    if (!grad) return;
    for (int j = threadIdx.x; j < width; j += kDiagonalThreads) {
      T& out = grad[row * width + j];
      out = (p.accumulate ? out : T(0)) + T(slope) * matrix.data[row * matrix.stride + j];
    }
  };
  add(p.x, p.width_x, 4 * p.coefficient * difference, p.grad_x);
  add(p.y, p.width_y, -4 * p.coefficient * difference, p.grad_y);
  if (threadIdx.x == 0) partials[p.partials + row] = p.coefficient * difference * difference;
}

}  // namespace kdkernels
