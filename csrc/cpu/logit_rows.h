// Rows of logits of any element type and strides, read one by one, and what losses of their softmax share.
#pragma once

#include <algorithm>
#include <limits>

#include "convert.h"
#include "exp.h"
#include "tensors.h"

namespace kdkernels {

constexpr int64_t kSumBlock = 1024;  // elements that are summed in the compute type before their sum is added in double
constexpr int64_t kLogitsPerThread = 16384;

// Reads rows as numbers of the compute type T.
template <typename T>
class LogitRows {
 public:
  explicit LogitRows(const Tensor& tensor) : classes_(tensor.size(1)), column_(tensor.stride(1)) {
    with_element_type(tensor, [&](auto element) {
      using Element = decltype(element);
      data_ = static_cast<const char*>(tensor.const_data_ptr());
      row_bytes_ = tensor.stride(0) * int64_t(sizeof(Element));
      if (!std::is_same_v<Element, T> || column_ != 1) convert_ = convert<Element>;
    });
  }

  // Return row i: in place, or converted in the buffer.
  const T* row(int64_t i, T* buffer) const {
    const void* source = data_ + i * row_bytes_;
    if (!convert_) return static_cast<const T*>(source);
    convert_(source, column_, classes_, buffer);
    return buffer;
  }

 private:
  template <typename Element>
  static void convert(const void* source, int64_t column, int64_t count, T* out) {
    widen(static_cast<const Element*>(source), column, count, out);
  }

  const char* data_;
  int64_t row_bytes_, classes_, column_;
  void (*convert_)(const void* source, int64_t column, int64_t count, T* out) = nullptr;
};

template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

template <typename T>
double lane_sum(typename Vec<T>::type lanes) {
  using V = typename Vec<T>::type;
  return reduce<T>(lanes, [](V a, V b) { return a + b; });
}

// A sum of vectors in double.
template <typename T>
class WideSum {
  typedef T Part __attribute__((vector_size(kVectorBytes * sizeof(T) / sizeof(double))));
  static constexpr int kParts = sizeof(double) / sizeof(T);

 public:
  void add(typename Vec<T>::type value) {
    Part parts[kParts];
    std::memcpy(parts, &value, sizeof(value));
    for (int i = 0; i < kParts; ++i) sums_[i] += as_double(parts[i]);
  }
  double total() const {
    typename Vec<double>::type sum = sums_[0];
    for (int i = 1; i < kParts; ++i) sum += sums_[i];
    return lane_sum<double>(sum);
  }

 private:
  // GCC would convert a quarter of a vector at a time.
  static typename Vec<double>::type as_double(Part part) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<T, float>) return (Vec<double>::type)_mm512_cvtps_pd((__m256)part);
#elif defined(__AVX2__)
    if constexpr (std::is_same_v<T, float>) return (Vec<double>::type)_mm256_cvtps_pd((__m128)part);
#endif
    return __builtin_convertvector(part, Vec<double>::type);
  }

  typename Vec<double>::type sums_[kParts] = {};
};

// Return the largest element of [begin, end), at least `largest`.
template <typename T>
T max_of(const T* row, int64_t begin, int64_t end, T largest) {
  using V = typename Vec<T>::type;
  // Four maxima, because an instruction waits four cycles for the one before.
  V result = V{} + largest, parts[4] = {result, result, result, result};
  for (; begin + 4 * Vec<T>::size <= end; begin += 4 * Vec<T>::size)
    for (int i = 0; i < 4; ++i) parts[i] = larger<T>(parts[i], load<T>(row + begin + i * Vec<T>::size));
  for (const V part : parts) result = larger<T>(result, part);
  for_vectors<T>(begin, end,
                 [&](int64_t j, int64_t count) { result = larger<T>(result, load_first<T>(row + j, count, largest)); });
  return reduce<T>(result, [](V a, V b) { return larger<T>(a, b); });
}

// Return the position of the first element that equals `value`, or `count` if there is none.
template <typename T>
int64_t position_of(const T* row, int64_t count, T value) {
  constexpr int64_t lanes = Vec<T>::size;
  int64_t j = 0;
  while (j + lanes <= count && !any<T>(load<T>(row + j) == value)) j += lanes;
  return std::find(row + j, row + count, value) - row;
}

// Call f(begin, end) for blocks of at most kSumBlock elements of [begin, end).
template <typename F>
void for_blocks(int64_t begin, int64_t end, const F& f) {
  for (; begin < end; begin += kSumBlock) f(begin, std::min(begin + kSumBlock, end));
}

// Return the sum over [begin, end) of f(j, count). Only the first `count` lanes of f count.
template <typename T, typename F>
double sum_over(int64_t begin, int64_t end, const F& f) {
  using V = typename Vec<T>::type;
  double total = 0;
  for_blocks(begin, end, [&](int64_t first, int64_t last) {
    V block{};
    for_vectors<T>(first, last, [&](int64_t j, int64_t count) {
      const V term = f(j, count);
      block += first_lanes<T>(count) ? term : V{};
    });
    total += lane_sum<T>(block);
  });
  return total;
}

}  // namespace kdkernels
