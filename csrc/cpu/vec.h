// Vectors of the widest kind that the instruction set has, with GCC's vector extension. Every source file is compiled once per
// instruction set, into its own library.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

namespace kdkernels {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <typename T>
struct Vec {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  static constexpr int64_t size = kVectorBytes / sizeof(T);
};

// As many doubles as Vec<T> has lanes.
template <typename T>
struct Doubles {
  typedef double type __attribute__((vector_size(2 * kVectorBytes)));
};

template <>
struct Doubles<double> : Vec<double> {};

template <typename T>
inline typename Vec<T>::type load(const T* source) {
  typename Vec<T>::type value;
  std::memcpy(&value, source, sizeof(value));
  return value;
}

template <typename T>
inline void store(T* out, typename Vec<T>::type value) {
  std::memcpy(out, &value, sizeof(value));
}

namespace vec_detail {

// Exchange lanes between two vectors: lanes with bit `step` set in the first, and lanes with this bit clear in the second.
template <int64_t step, typename V, int64_t... lane>
inline void exchange(V& a, V& b, std::integer_sequence<int64_t, lane...>) {
  constexpr int64_t size = sizeof...(lane);
  const V low = __builtin_shufflevector(a, b, (lane & step ? size + lane - step : lane)...);
  const V high = __builtin_shufflevector(a, b, (lane & step ? size + lane : lane + step)...);
  a = low;
  b = high;
}

template <typename T, int64_t step>
inline void exchange_all(typename Vec<T>::type* rows) {
  constexpr int64_t size = Vec<T>::size;
  if constexpr (step < size) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < size; ++i)
      if (!(i & step)) exchange<step>(rows[i], rows[i + step], std::make_integer_sequence<int64_t, size>{});
    exchange_all<T, 2 * step>(rows);
  }
}

}  // namespace vec_detail

// Transpose a block of `lines` <= Vec<T>::size lines of Vec<T>::size elements: out[k * out_line + i] =
// alpha * source[i * source_line + k], and 0 for the missing lines. Whole vectors are stored, k ascending.
template <typename T>
inline void transpose_block(const T* source, int64_t source_line, int64_t lines, T alpha, T* out, int64_t out_line) {
  constexpr int64_t size = Vec<T>::size;
  typename Vec<T>::type rows[size];
#pragma GCC unroll 16
  for (int64_t i = 0; i < size; ++i)
    rows[i] = i < lines ? alpha * load<T>(source + i * source_line) : typename Vec<T>::type{};
  vec_detail::exchange_all<T, 1>(rows);
#pragma GCC unroll 16
  for (int64_t i = 0; i < size; ++i) store<T>(out + i * out_line, rows[i]);
}

}  // namespace kdkernels
