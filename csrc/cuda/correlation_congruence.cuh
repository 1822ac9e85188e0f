// The begin and the end of the CCKD loss: from embeddings of any dtype and strides to rows, and back for the gradient.
#pragma once

#include "comparison.cuh"
#include "elements.cuh"
#include "group.cuh"

namespace kdkernels {

constexpr double kEmbeddingEps = 1e-12;  // an embedding of this norm or less is the zero vector

// One network's embeddings. Rows are `pitch` apart. For rbf, a row may end with a 1. The gradient of this 1 is the sum
// of the slopes, which gives the row's own term. For unit rows this term is radial and not needed.
//
// Half-precision rows, with numbers E, keep their digits. They are not divided by their norms, but scaled to a common
// size by powers of two. Their factors turn them into unit vectors. `norms` then undo the powers.
template <typename T, typename E>
struct Embedding {
  const void* data;
  Element type;
  int64_t row_stride, stride;
  int width, pitch;
  bool normalize;
  E* rows;
  T *norms, *factors;  // factors: null unless rows are half precision
  T* terms;            // per row the square (rbf) or the mean (mmd); null for other kernels
  bool means;
};

// A block per row.
template <typename T, typename E>
__global__ void __launch_bounds__(kEmbeddingThreads, 1)
    embed_kernel(const __grid_constant__ Group<Embedding<T, E>> group) {
  const int index = group.index();
  const Embedding<T, E>& p = group.problems[index];
  const int64_t row = group.block(index);
  const auto value = [&](int j) { return read<T>(p.data, p.type, row * p.row_stride + j * p.stride); };
  double squares = 0, sum = 0;
  for (int j = threadIdx.x; j < p.width; j += kEmbeddingThreads) squares += double(value(j)) * double(value(j));
  const double norm = sqrt(block_reduce(squares, Sum<double>()));
  const bool dead = p.normalize && norm <= kEmbeddingEps;
  const double power = kIsHalf<E> && p.normalize ? balance(norm) : 1;
  const double multiplier = !p.normalize ? 1 : kIsHalf<E> ? power : 1 / norm;
  E* out = p.rows + row * p.pitch;
  squares = 0;
  for (int j = threadIdx.x; j < p.pitch; j += kEmbeddingThreads) {
    T result = j == p.width ? T(1) : T(0);
    if (j < p.width) {
      result = dead ? T(0) : T(double(value(j)) * multiplier);
      squares += double(result) * double(result);
      sum += double(result);
    }
    out[j] = number<E>(result);
  }
  const double term = block_reduce(p.means ? sum / p.width : squares, Sum<double>());
  if (threadIdx.x > 0) return;
  const T factor = dead ? T(0) : kIsHalf<E> && p.normalize ? T(1 / (norm * power)) : T(1);
  p.norms[row] = dead ? T(0) : T(kIsHalf<E> ? 1 / power : norm);
  if (p.factors) p.factors[row] = factor;
  if (p.terms) p.terms[row] = T(term * double(factor) * double(factor));
}

// Move the rows to their common centre. Distances do not change, but the products that give them cancel less.
template <typename T>
struct Centring {
  T *rows, *terms;
  int64_t count;
  int width, pitch;
};

// A block per 32 columns.
template <typename T>
__global__ void __launch_bounds__(kCentreColumns* kCentreLines)
    centre_kernel(const __grid_constant__ Group<Centring<T>> group) {
  SHARED_ARRAY(double, sums, kCentreColumns* kCentreLines);
  const int index = group.index();
  const Centring<T>& p = group.problems[index];
  const int column = group.block(index) * kCentreColumns + int(threadIdx.x) % kCentreColumns;
  const int line = int(threadIdx.x) / kCentreColumns;
  const bool inside = column < p.width;
  double sum = 0;
  for (int64_t r = line; r < p.count; r += kCentreLines) sum += inside ? double(p.rows[r * p.pitch + column]) : 0;
  sums[threadIdx.x] = sum;
  __syncthreads();
  double mean = 0;
  for (int i = 0; i < kCentreLines; ++i) mean += sums[i * kCentreColumns + int(threadIdx.x) % kCentreColumns];
  mean /= double(p.count);
  if (!inside) return;
  for (int64_t r = line; r < p.count; r += kCentreLines)
    p.rows[r * p.pitch + column] = T(double(p.rows[r * p.pitch + column]) - mean);
}

// The squares of the moved rows. One block per row.
template <typename T>
__global__ void __launch_bounds__(kEmbeddingThreads) square_kernel(const __grid_constant__ Group<Centring<T>> group) {
  const int index = group.index();
  const Centring<T>& p = group.problems[index];
  const int64_t row = group.block(index);
  double squares = 0;
  for (int j = threadIdx.x; j < p.width; j += kEmbeddingThreads) {
    const double value = p.rows[row * p.pitch + j];
    squares += value * value;
  }
  squares = block_reduce(squares, Sum<double>());
  if (threadIdx.x == 0) p.terms[row] = T(squares);
}

// κ = |mean(a) − mean(b)|. The block of row i sums squared differences and slopes over j.
template <typename T>
struct Means {
  const T *of_x, *of_y;
  int64_t rows;
  double scale;
  T *grad_x, *grad_y;  // [rows][width], all components of a row are equal; null if not wanted
  int width_x, width_y;
};

template <typename T>
__global__ void __launch_bounds__(kEmbeddingThreads) mean_kernel(Means<T> p, double* partials) {
  const int64_t row = blockIdx.x;
  double sum = 0, slope_x = 0, slope_y = 0;
  for (int64_t j = threadIdx.x; j < p.rows; j += kEmbeddingThreads) {
    const T x = p.of_x[row] - p.of_x[j], y = p.of_y[row] - p.of_y[j];
    const double difference = double(x < 0 ? -x : x) - double(y < 0 ? -y : y);
    sum += difference * difference;
    slope_x += x > 0 ? difference : x < 0 ? -difference : 0;
    slope_y += y > 0 ? difference : y < 0 ? -difference : 0;
  }
  sum = block_reduce(sum, Sum<double>());
  slope_x = block_reduce(slope_x, Sum<double>());
  slope_y = block_reduce(slope_y, Sum<double>());
  if (p.grad_x)
    for (int j = threadIdx.x; j < p.width_x; j += kEmbeddingThreads)
      p.grad_x[row * p.width_x + j] = T(4 * p.scale * slope_x / p.width_x);
  if (p.grad_y)
    for (int j = threadIdx.x; j < p.width_y; j += kEmbeddingThreads)
      p.grad_y[row * p.width_y + j] = T(-4 * p.scale * slope_y / p.width_y);
  if (threadIdx.x == 0) partials[row] = p.scale * sum;
}

// From the gradient of the rows to the gradient of the embeddings: subtract each row's own term, and go through the
// norm.
template <typename T, typename E>
struct Return {
  const T* grad;
  const E* rows;
  const T *norms, *factors;
  T* out;
  int width, pitch;
  bool normalize;
};

// One block per row. One more block, the last, adds up the loss.
template <typename T, typename E>
__global__ void __launch_bounds__(kEmbeddingThreads)
    return_kernel(const __grid_constant__ Group<Return<T, E>> group, const double* partials, int64_t count, T* loss) {
  if (blockIdx.x == gridDim.x - 1) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < count; i += kEmbeddingThreads) sum += partials[i];
    sum = block_reduce(sum, Sum<double>());
    if (threadIdx.x == 0) *loss = T(sum);
    return;
  }
  const int index = group.index();
  const Return<T, E>& p = group.problems[index];
  const int64_t row = group.block(index);
  const T* const grad = p.grad + row * p.pitch;
  const T slopes = p.pitch > p.width ? grad[p.width] : T(0);
  const T factor = p.factors ? p.factors[row] : T(1);
  const auto own = [&](int j) { return number<T>(p.rows[row * p.pitch + j]) * factor; };
  const auto value = [&](int j) { return grad[j] - slopes * own(j); };
  T radial = 0, inverse = 1;
  if (p.normalize) {
    double product = 0;
    for (int j = threadIdx.x; j < p.width; j += kEmbeddingThreads) product += double(value(j)) * double(own(j));
    radial = T(block_reduce(product, Sum<double>()));
    inverse = p.norms[row] == 0 ? T(0) : 1 / p.norms[row];
  }
  for (int j = threadIdx.x; j < p.width; j += kEmbeddingThreads)
    p.out[row * p.width + j] = (value(j) - radial * own(j)) * inverse;
}

}  // namespace kdkernels
