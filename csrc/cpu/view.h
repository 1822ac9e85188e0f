// A read-only matrix in any strides.
#pragma once

#include <cstdint>

namespace kdkernels {

// Element (i, j) lies at data[i * row + j * col].
template <typename T>
struct View {
  const T* data;
  int64_t row, col;

  const T* at(int64_t i, int64_t j) const { return data + i * row + j * col; }
  View from(int64_t i, int64_t j) const { return {at(i, j), row, col}; }
  View transposed() const { return {data, col, row}; }
};

// One product of a sum: alpha * a (m x depth) * b (depth x n).
template <typename T>
struct Term {
  View<T> a, b;
  int64_t depth;
  T alpha;
};

}  // namespace kdkernels
