// Rows of elements of any type as numbers of the compute type, and back.
#pragma once

#include <torch/headeronly/util/Half.h>

#include "lanes.h"

namespace kdkernels {

using torch::headeronly::Half;

// A vector of float32 numbers from float16, and back. GCC converts bfloat16 in vectors by itself, but not float16.
#if defined(__AVX512F__)
inline Vec<float>::type load_wide(const Half* source) {
  return (Vec<float>::type)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
}
inline void store_narrow(Half* out, Vec<float>::type value) {
  const __m256i bits = _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), bits);
}
#elif defined(__AVX2__)
inline Vec<float>::type load_wide(const Half* source) {
  return (Vec<float>::type)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
}
inline void store_narrow(Half* out, Vec<float>::type value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
}
#endif

// out[j] = source[j * stride]
template <typename T, typename E>
inline void widen(const E* source, int64_t stride, int64_t count, T* out) {
  int64_t j = 0;
#if defined(__AVX2__)
  if constexpr (std::is_same_v<T, float> && std::is_same_v<E, Half>)
    if (stride == 1)
      for (; j + Vec<T>::size <= count; j += Vec<T>::size) store<T>(out + j, load_wide(source + j));
#endif
  if (stride == 1)
    for (; j < count; ++j) out[j] = static_cast<T>(source[j]);
  else
    for (; j < count; ++j) out[j] = static_cast<T>(source[j * stride]);
}

// out[j * stride] = source[j]
template <typename T, typename E>
inline void narrow(const T* source, int64_t count, E* out, int64_t stride) {
  int64_t j = 0;
#if defined(__AVX2__)
  if constexpr (std::is_same_v<T, float> && std::is_same_v<E, Half>)
    if (stride == 1)
      for (; j + Vec<T>::size <= count; j += Vec<T>::size) store_narrow(out + j, load<T>(source + j));
#endif
  if (stride == 1)
    for (; j < count; ++j) out[j] = static_cast<E>(source[j]);
  else
    for (; j < count; ++j) out[j * stride] = static_cast<E>(source[j]);
}

}  // namespace kdkernels
