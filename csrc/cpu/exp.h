// Vectorised exp(x) for x <= 0, as softmax needs it, and related functions.
#pragma once

#include "lanes.h"

namespace kdkernels {

namespace exp_detail {

template <typename T>
struct Constants;

template <>
struct Constants<float> {
  static constexpr int mantissa_bits = 23;
  static constexpr int degree = 7;
  static constexpr float rounder = 0x1.8p23f;  // adding it rounds to an integer and leaves this integer in the low bits
  static constexpr float lowest = -87.0f;
  static constexpr float ln2_high = 0x1.62e400p-1f, ln2_low = 0x1.7f7d1cp-20f;
};

template <>
struct Constants<double> {
  static constexpr int mantissa_bits = 52;
  static constexpr int degree = 13;
  static constexpr double rounder = 0x1.8p52;
  static constexpr double lowest = -708.0;
  static constexpr double ln2_high = 0x1.62e42fefap-1, ln2_low = 0x1.cf79abc9e3b3ap-40;
};

template <typename T>
constexpr T one_over_factorial(int n) {
  T product = 1;
  for (int i = 2; i <= n; ++i) product *= i;
  return 1 / product;
}

}  // namespace exp_detail

template <typename T>
constexpr T kLog2e = T(1.4426950408889634);
template <typename T>
constexpr T kLn2 = T(0.6931471805599453);

// exp(r) for |r| <= ln(2) / 2, by its Taylor series.
template <typename T>
inline typename Vec<T>::type exp_series(typename Vec<T>::type r) {
  constexpr int degree = exp_detail::Constants<T>::degree;
  typename Vec<T>::type series = typename Vec<T>::type{} + exp_detail::one_over_factorial<T>(degree);
#pragma GCC unroll 16
  for (int i = degree - 1; i >= 0; --i) series = series * r + exp_detail::one_over_factorial<T>(i);
  return series;
}

// Relative error at most 1.5e-7 (float) or 3e-16 (double), exact at 0; NaN stays NaN. Results below exp(-87) (float) or
// exp(-708) (double) are 0, because denormal numbers are slow.
template <typename T>
inline typename Vec<T>::type exp_nonpositive(typename Vec<T>::type x) {
  using V = typename Vec<T>::type;
  using C = exp_detail::Constants<T>;
  // x = n ln 2 + r with |r| <= ln(2) / 2.
  const V shifted = x * kLog2e<T> + C::rounder;
  const V n = shifted - C::rounder;
  const V r = x - n * C::ln2_high - n * C::ln2_low;
  // Lanes below the lowest exponent wrap around. They are replaced by 0 afterwards.
  using Bits [[gnu::vector_size(sizeof(V))]] = std::make_unsigned_t<Integer<T>>;
  const V one = V{} + T(1);
  const Bits exponent = reinterpret_cast<Bits>(shifted) << C::mantissa_bits;
  const V power = reinterpret_cast<V>(exponent + reinterpret_cast<Bits>(one));
  return x < C::lowest ? V{} : exp_series<T>(r) * power;
}

// 2^r for |r| <= 1/2. In float, it is a polynomial fitted to the interval and exact at 0.
template <typename T>
inline typename Vec<T>::type exp2_near_zero(typename Vec<T>::type r) {
  using V = typename Vec<T>::type;
  if constexpr (std::is_same_v<T, float>) {
    V series = V{} + 0x1.5bb9b4p-10f;
    series = series * r + 0x1.3cea86p-7f;
    series = series * r + 0x1.c6b754p-5f;
    series = series * r + 0x1.ebf9bcp-3f;
    series = series * r + 0x1.62e42ap-1f;
    return series * r + 1.0f;
  } else {
    return exp_series<T>(r * kLn2<T>);
  }
}

// power * 2^n, by an addition to the bits of the exponent. The last bits of shifted are n. Out of range, a result is any number.
template <typename T>
inline typename Vec<T>::type times_power_of_two(typename Vec<T>::type power, typename Vec<T>::type shifted) {
  using V = typename Vec<T>::type;
  using Bits [[gnu::vector_size(sizeof(V))]] = std::make_unsigned_t<Integer<T>>;  // which may wrap around
  const Bits exponent = reinterpret_cast<Bits>(shifted) << exp_detail::Constants<T>::mantissa_bits;
  return reinterpret_cast<V>(reinterpret_cast<Bits>(power) + exponent);
}

// 2^x for finite x <= 0. In float, it takes fewer instructions than exp_nonpositive. The relative error is at most 2e-7 (3e-16
// in double), and 0 is exact. Below the normal numbers, a result is denormal, 0, or close to the smallest normal number. NaN
// stays NaN.
template <typename T>
inline typename Vec<T>::type exp2_nonpositive(typename Vec<T>::type x) {
  using V = typename Vec<T>::type;
  using C = exp_detail::Constants<T>;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    const V n = (V)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
    return (V)_mm512_scalef_ps((__m512)exp2_near_zero<T>(x - n), (__m512)n);
  }
#endif
  x = larger<T>(V{} + (C::lowest + 1) * kLog2e<T>, x);
  const V shifted = x + C::rounder;
  return times_power_of_two<T>(exp2_near_zero<T>(x - (shifted - C::rounder)), shifted);
}

// The same for every x <= 0. Below the normal numbers, also for -inf, a result is close to the smallest normal number.
template <typename T>
inline typename Vec<T>::type exp2_or_least(typename Vec<T>::type x) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) x = larger<T>(typename Vec<T>::type{} - T(126), x);
#endif
  return exp2_nonpositive<T>(x);
}

// The same, with 0 below the normal numbers.
template <typename T>
inline typename Vec<T>::type exp2_or_zero(typename Vec<T>::type x) {
  return x < exp_detail::Constants<T>::lowest * kLog2e<T> ? typename Vec<T>::type{} : exp2_nonpositive<T>(x);
}

// exp(-d) - 1 + d for |d| <= 1/2 from its Taylor series, in which nothing cancels.
template <typename T>
inline typename Vec<T>::type exp_remainder(typename Vec<T>::type d) {
  using V = typename Vec<T>::type;
  constexpr int degree = exp_detail::Constants<T>::degree;
  V series = V{} + exp_detail::one_over_factorial<T>(degree + 2);
#pragma GCC unroll 16
  for (int i = degree + 1; i >= 2; --i) series = exp_detail::one_over_factorial<T>(i) - series * d;
  return series * d * d;
}

}  // namespace kdkernels
