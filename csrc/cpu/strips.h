// Gram matrices, one strip of rows at a time. An epilogue turns a strip into a loss, and into the slopes for the gradients.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <vector>

#include "gemm.h"
#include "lanes.h"

namespace kdkernels {

template <typename T>
struct Operand {
  View<T> rows;
  int64_t width;
};

// A gradient that is being accumulated. Row r begins at data + r * line. data is null if it is not wanted.
template <typename T>
struct Gradient {
  T* data = nullptr;
  int64_t line = 0;
  bool written = false;
};

// The matrix plus plusᵀ − minus minusᵀ. Without both, the epilogue fills it.
template <typename T>
struct Gram {
  const Operand<T>*plus = nullptr, *minus = nullptr;
};

// A gradient to which alpha * S * rows is added. S is the current symmetric matrix, or the matrix of this number.
template <typename T>
struct Target {
  Operand<T> operand;
  Gradient<T>* gradient;
  T alpha;
  int64_t matrix = 0;
};

// Return the sum of the vectors f(j, count) over [begin, end), in short runs that are added in float64. Lanes from count on are
// left out.
template <typename T, typename F>
double sum_vectors(int64_t begin, int64_t end, const F& f) {
  constexpr int64_t lanes = Vec<T>::size, run = 32 * lanes;
  double total = 0;
  for (int64_t i = begin; i < end; i += run) {
    typename Vec<T>::type sum = {};
    for_vectors<T>(i, std::min(end, i + run), [&](int64_t j, int64_t count) {
      const auto value = f(j, count);
      sum += first_lanes<T>(count) ? value : typename Vec<T>::type{};
    });
    for (int64_t lane = 0; lane < lanes; ++lane) total += sum[lane];
  }
  return total;
}

template <typename T>
double sum_squares(const T* values, int64_t count) {
  return sum_vectors<T>(0, count, [&](int64_t j, int64_t lanes) {
    const auto value = load_first<T>(values + j, lanes, T(0));
    return value * value;
  });
}

// Return the sum of squares of a symmetric matrix, from its upper triangle.
template <typename T>
double sum_squares_symmetric(const T* matrix, int64_t size) {
  double total = 0;
  for (int64_t i = 0; i < size; ++i) {
    const T* row = matrix + i * size;
    total += double(row[i]) * row[i] + 2 * sum_squares(row + i + 1, size - i - 1);
  }
  return total;
}

// Copy the upper triangle to the lower triangle, in square blocks. A thread takes as many rows near the top as near the bottom,
// so all threads have equal work.
template <typename T>
void mirror_upper(T* matrix, int64_t size, int64_t line) {
  constexpr int64_t lanes = Vec<T>::size;
  const auto mirror = [&](int64_t i0) {
    const int64_t rows = std::min(lanes, size - i0);
    for (int64_t j = 0; rows == lanes && j < i0; j += lanes)
      transpose_block<T>(matrix + j * line + i0, line, lanes, 1, matrix + i0 * line + j, line);
    for (int64_t i = i0; i < i0 + rows; ++i)
      for (int64_t j = rows == lanes ? i0 : 0; j < i; ++j) matrix[i * line + j] = matrix[j * line + i];
  };
  const int64_t blocks = (size + lanes - 1) / lanes;
  parallel_blocks((blocks + 1) / 2, 1, 1 + (1 << 13) / size, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      mirror(b * lanes);
      mirror((blocks - 1 - b) * lanes);  // the middle block is mirrored twice
    }
  });
}

// `count` rows of the matrices, from row `begin` and column `begin` on. Columns left of the diagonal are undefined.
template <typename T, int64_t matrices>
struct Strip {
  int64_t begin, count, columns, line;
  std::array<T*, matrices> entries;

  std::array<T*, matrices> at(int64_t i, int64_t j) const {
    std::array<T*, matrices> result = entries;
    for (T*& entry : result) entry += i * line + j;
    return result;
  }

  template <typename F>
  void for_rows(const F& f) const {
    parallel_blocks(count, 1, 1 + (1 << 15) / columns, [&](int64_t i0, int64_t i1) {
      for (int64_t i = i0; i < i1; ++i) f(i);
    });
  }

  // Add the strip's part of row r of a symmetric matrix to sums[r], in float64. r counts from `begin`. sign = -1 is for an
  // antisymmetric matrix. value(entries, count) returns up to a vector of elements.
  template <typename F>
  void add_row_sums(double* sums, double sign, const F& value) const {
    using V = typename Vec<T>::type;
    using Wide = typename Doubles<T>::type;
    for_rows([&](int64_t i) {
      Wide sum = {};
      for_vectors<T>(i, columns, [&](int64_t j, int64_t lanes) {
        sum += __builtin_convertvector(first_lanes<T>(lanes) ? value(at(i, j), lanes) : V{}, Wide);
      });
      for (int64_t lane = 0; lane < Vec<T>::size; ++lane) sums[i] += sum[lane];
    });
    constexpr int64_t rows = 8;
    parallel_blocks(columns, Vec<T>::size, 1 + (1 << 15) / count, [&](int64_t j0, int64_t j1) {
      for (int64_t i0 = 0; i0 < count; i0 += rows)
        for_vectors<T>(std::max(j0, i0), j1, [&](int64_t j, int64_t lanes) {
          Wide sum = {};
          for (int64_t i = i0; i < std::min(count, i0 + rows); ++i) {
            const V values = value(at(i, j), lanes);
            sum += __builtin_convertvector(lane_numbers<T>() > Integer<T>(i - j) ? values : V{}, Wide);
          }
          for (int64_t lane = 0; lane < lanes; ++lane) sums[j + lane] += sign * sum[lane];
        });
    });
  }
};

// Rows of a strip. They are enough for efficient products, and a fraction of the matrix.
inline int64_t strip_height(int64_t rows) {
  return std::min(rows, std::clamp<int64_t>(round_up(rows / 2, 32), 64, 512));
}

// Symmetric matrices, the upper triangle only.
template <typename T, int64_t matrices = 1>
class Strips {
 public:
  Strips(int64_t rows, std::array<Gram<T>, matrices> grams, std::vector<Target<T>> targets)
      : Strips(rows, strip_height(rows), grams, std::move(targets)) {}

  Strips(int64_t rows, int64_t height, std::array<Gram<T>, matrices> grams, std::vector<Target<T>> targets)
      : rows_(rows), height_(height), grams_(grams), targets_(std::move(targets)) {}

  // Call f(strip) on one strip after the other.
  template <typename F>
  void for_each(const F& f) {
    const int64_t size = height_ * spread<T>(rows_);
    T* memory = workspace<T, Scratch::strip>(matrices * size);
    for (int64_t begin = 0; begin < rows_; begin += height_) {
      const int64_t columns = rows_ - begin;
      Strip<T, matrices> strip{begin, std::min(height_, columns), columns, spread<T>(columns), {}};
      for (int64_t m = 0; m < matrices; ++m) {
        strip.entries[m] = memory + m * size;
        if (!whole_) products(strip, m);
      }
      whole_ = height_ == rows_;
      f(strip);
    }
  }

  // Return the sum of epilogue(r, length, entries) over the rows. The entries begin at the diagonal, and the epilogue turns
  // them into slopes. The products of the slopes with the targets' rows are added to the gradients.
  template <typename Epilogue>
  double run(const Epilogue& epilogue) {
    return run(epilogue, [](const auto&) {});
  }

  // Also call after(strip) on every strip of slopes.
  template <typename Epilogue, typename After>
  double run(const Epilogue& epilogue, const After& after) {
    Buffer<double> losses(height_);
    double loss = 0;
    for_each([&](const Strip<T, matrices>& strip) {
      strip.for_rows(
          [&](int64_t i) { losses.data()[i] = epilogue(strip.begin + i, strip.columns - i, strip.at(i, i)); });
      loss = std::accumulate(losses.data(), losses.data() + strip.count, loss);
      after(strip);
      for (int64_t m = 0; m < matrices; ++m)
        if (std::any_of(targets_.begin(), targets_.end(), [&](const Target<T>& target) { return target.matrix == m; }))
          mirror_upper(strip.entries[m], strip.count, strip.line);
      for (Target<T>& target : targets_) add_gradient(strip, target);
    });
    return loss;
  }

 private:
  void products(const Strip<T, matrices>& strip, int64_t m) const {
    const auto [plus, minus] = grams_[m];
    std::vector<Term<T>> terms;
    for (const Operand<T>* operand : {plus, minus}) {
      if (!operand) continue;
      const View<T> rows = operand->rows.from(strip.begin, 0);
      terms.push_back({rows, rows.transposed(), operand->width, T(operand == plus ? 1 : -1)});
    }
    if (!terms.empty()) gemm_upper<T>(strip.count, strip.columns, terms, strip.entries[m], strip.line);
  }

  // The rows of the strip get S * rows. The rows below get their share of the other triangle.
  void add_gradient(const Strip<T, matrices>& strip, const Target<T>& target) const {
    const View<T> matrix{strip.entries[target.matrix], strip.line, 1}, rows = target.operand.rows.from(strip.begin, 0);
    Gradient<T>& gradient = *target.gradient;
    T* out = gradient.data + strip.begin * gradient.line;
    const Product<T> how{target.alpha, gradient.written || strip.begin > 0};
    gemm<T>(strip.count, target.operand.width, strip.columns, matrix, rows, out, gradient.line, how);
    if (strip.begin + strip.count == rows_)
      gradient.written = true;
    else
      gemm<T>(strip.columns - strip.count, target.operand.width, strip.count, matrix.from(0, strip.count).transposed(),
              rows, out + strip.count * gradient.line, gradient.line, how);
  }

  int64_t rows_, height_;
  std::array<Gram<T>, matrices> grams_;
  std::vector<Target<T>> targets_;
  bool whole_ = false;  // the strip is the whole matrix, and is not computed again
};

}  // namespace kdkernels
