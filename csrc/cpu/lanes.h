// Single lanes of vectors: for rows whose length is not a multiple of the lanes, and for sums over all lanes.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <type_traits>

#include "vec.h"

namespace kdkernels {

// While it exists, the thread treats denormal numbers as 0. Arithmetic with denormal numbers is a hundred times slower.
class FlushDenormals {
#if defined(__SSE__)
 public:
  FlushDenormals() : before_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(before_ | 0x8040); }
  ~FlushDenormals() { __builtin_ia32_ldmxcsr(before_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  unsigned before_;
#else
 public:
  FlushDenormals() {}
#endif
};

template <typename T>
using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

// The result of a comparison of vectors: integers as wide as T.
template <typename T>
using Mask = typename Vec<Integer<T>>::type;

// 0, 1, 2, ... by lane.
template <typename T>
inline Mask<T> lane_numbers() {
  Mask<T> lane;
  for (int64_t i = 0; i < Vec<T>::size; ++i) lane[i] = Integer<T>(i);
  return lane;
}

// A mask that is set in the first `count` lanes.
template <typename T>
inline Mask<T> first_lanes(int64_t count) {
  return lane_numbers<T>() < Integer<T>(count);
}

// The first `count` <= size elements, and `rest` in the other lanes.
template <typename T>
inline typename Vec<T>::type load_first(const T* source, int64_t count, T rest) {
  using V = typename Vec<T>::type;
  if (count == Vec<T>::size) return load<T>(source);
#if defined(__AVX512F__)
  const auto first = (1u << count) - 1;
  if constexpr (std::is_same_v<T, float>)
    return (V)_mm512_mask_loadu_ps((__m512)(V{} + rest), first, source);
  else
    return (V)_mm512_mask_loadu_pd((__m512d)(V{} + rest), first, source);
#elif defined(__AVX2__)
  const Mask<T> first = first_lanes<T>(count);
  if constexpr (std::is_same_v<T, float>)
    return first ? (V)_mm256_maskload_ps(source, (__m256i)first) : V{} + rest;
  else
    return first ? (V)_mm256_maskload_pd(source, (__m256i)first) : V{} + rest;
#else
  V value = V{} + rest;
  std::memcpy(&value, source, count * sizeof(T));
  return value;
#endif
}

template <typename T>
inline void store_first(T* out, typename Vec<T>::type value, int64_t count) {
  if (count == Vec<T>::size) return store<T>(out, value);
#if defined(__AVX512F__)
  const auto first = (1u << count) - 1;
  if constexpr (std::is_same_v<T, float>)
    _mm512_mask_storeu_ps(out, first, (__m512)value);
  else
    _mm512_mask_storeu_pd(out, first, (__m512d)value);
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>)
    _mm256_maskstore_ps(out, (__m256i)first_lanes<T>(count), (__m256)value);
  else
    _mm256_maskstore_pd(out, (__m256i)first_lanes<T>(count), (__m256d)value);
#else
  std::memcpy(out, &value, count * sizeof(T));
#endif
}

// Return the larger number, or b if either is NaN, in one instruction. GCC does not compile a comparison to it.
template <typename T>
inline typename Vec<T>::type larger(typename Vec<T>::type a, typename Vec<T>::type b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>)
    return (decltype(a))_mm512_max_ps((__m512)a, (__m512)b);
  else
    return (decltype(a))_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>)
    return (decltype(a))_mm256_max_ps((__m256)a, (__m256)b);
  else
    return (decltype(a))_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return a > b ? a : b;
#endif
}

// Call f(j, count) for the vectors that cover [begin, end). Only the last vector may have count < size.
template <typename T, typename F>
inline void for_vectors(int64_t begin, int64_t end, const F& f) {
  int64_t j = begin;
  for (; j + Vec<T>::size <= end; j += Vec<T>::size) f(j, Vec<T>::size);
  if (j < end) f(j, end - j);
}

// Combine all lanes with f, which works on vectors.
template <typename T, typename F>
inline T reduce(typename Vec<T>::type value, const F& f) {
#pragma GCC unroll 8
  for (Integer<T> step = Vec<T>::size / 2; step > 0; step /= 2)
    value = f(value, __builtin_shuffle(value, lane_numbers<T>() ^ step));
  return value[0];
}

// Return whether a lane of a mask is set.
template <typename T>
inline bool any(Mask<T> mask) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return _mm512_movepi32_mask((__m512i)mask);
  else
    return _mm512_movepi64_mask((__m512i)mask);
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)mask);
#else
  return reduce<Integer<T>>(mask, [](Mask<T> a, Mask<T> b) { return a | b; });
#endif
}

}  // namespace kdkernels
