// Rows of numbers: read from tensors, normalised, and the gradients of the normalisation.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "convert.h"
#include "parallel.h"
#include "tensors.h"
#include "view.h"

namespace kdkernels {

// In float64, because its range holds the square of every float32.
template <typename T>
inline double dot(const T* a, const T* b, int64_t count) {
  constexpr int lanes = 16;
  double sums[lanes] = {}, total = 0;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes)
    for (int lane = 0; lane < lanes; ++lane) sums[lane] += double(a[i + lane]) * double(b[i + lane]);
  for (; i < count; ++i) total += double(a[i]) * double(b[i]);
  for (int lane = 0; lane < lanes; ++lane) total += sums[lane];
  return total;
}

// Divide a row by its norm and return the norm. A row of norm <= eps becomes zero, and its norm is 0.
template <typename T>
inline T normalise(T* row, int64_t length, double eps) {
  const double norm = std::sqrt(dot(row, row, length));
  if (norm <= eps) {
    std::fill_n(row, length, T(0));
    return 0;
  }
  const double inverse = 1 / norm;
  // Outside this range, the inverse is not a normal float32.
  if (norm > 1e-30 && norm < 1e30)
    for (int64_t j = 0; j < length; ++j) row[j] *= T(inverse);
  else
    for (int64_t j = 0; j < length; ++j) row[j] = T(double(row[j]) * inverse);
  return T(norm);
}

// Compute the gradient before the normalisation from `grad`, the gradient after it: (g − x̂ ⟨g, x̂⟩) / ‖x‖. It may work in
// place.
template <typename T>
inline void denormalise_row(const T* grad, const T* row, T norm, int64_t length, T* out) {
  if (norm == 0) {
    std::fill_n(out, length, T(0));
    return;
  }
  const T radial = T(dot(grad, row, length)), inverse = 1 / norm;
  for (int64_t j = 0; j < length; ++j) out[j] = (grad[j] - row[j] * radial) * inverse;
}

// Return whether the rows of an n x d tensor can be read in place.
template <typename T>
bool readable(const Tensor& tensor) {
  return tensor.scalar_type() == kScalarType<T> && (tensor.stride(1) == 1 || tensor.size(1) == 1);
}

// Copy the rows of an n x d tensor of any element type and strides, and call f(r, row) on each copy.
template <typename T, typename F>
void copy_rows(const Tensor& tensor, T* out, const F& f) {
  const int64_t length = tensor.size(1), row = tensor.stride(0), column = tensor.stride(1);
  with_element_type(tensor, [&](auto type) {
    using E = decltype(type);
    const E* data = static_cast<const E*>(tensor.const_data_ptr());
    parallel_blocks(tensor.size(0), 1, 1 + (1 << 15) / length, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        T* to = out + r * length;
        widen(data + r * row, column, length, to);
        f(r, to);
      }
    });
  });
}

}  // namespace kdkernels
