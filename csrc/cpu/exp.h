// exp(x) on vectors, for x <= 0 as softmax needs it, and what is near it.
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
  static constexpr float rounder = 0x1.8p23f;  // adding it rounds to an integer, which its low bits then hold
  static constexpr float lowest = -87.0f;
  static constexpr float log2e = 0x1.715476p+0f, ln2_high = 0x1.62e400p-1f, ln2_low = 0x1.7f7d1cp-20f;
};

template <>
struct Constants<double> {
  static constexpr int mantissa_bits = 52;
  static constexpr int degree = 13;
  static constexpr double rounder = 0x1.8p52;
  static constexpr double lowest = -708.0;
  static constexpr double log2e = 0x1.71547652b82fep+0, ln2_high = 0x1.62e42fefap-1, ln2_low = 0x1.cf79abc9e3b3ap-40;
};

template <typename T>
constexpr T one_over_factorial(int n) {
  T product = 1;
  for (int i = 2; i <= n; ++i) product *= i;
  return 1 / product;
}

}  // namespace exp_detail

// Relative error at most 1.5e-7 (float) or 3e-16 (double), exact at 0; NaN stays NaN. Results below exp(-87) (float) or
// exp(-708) (double) are 0, so that nothing is denormal.
template <typename T>
inline typename Vec<T>::type exp_nonpositive(typename Vec<T>::type x) {
  using V = typename Vec<T>::type;
  using C = exp_detail::Constants<T>;
  // x = n ln 2 + r with |r| <= ln(2) / 2, and exp(r) by its Taylor series.
  const V shifted = x * C::log2e + C::rounder;
  const V n = shifted - C::rounder;
  const V r = x - n * C::ln2_high - n * C::ln2_low;
  V series = V{} + exp_detail::one_over_factorial<T>(C::degree);
#pragma GCC unroll 16
  for (int i = C::degree - 1; i >= 0; --i) series = series * r + exp_detail::one_over_factorial<T>(i);
  // Lanes below the lowest wrap around before they are replaced by 0.
  using Bits [[gnu::vector_size(sizeof(V))]] = std::make_unsigned_t<Integer<T>>;
  const V one = V{} + T(1);
  const Bits exponent = reinterpret_cast<Bits>(shifted) << C::mantissa_bits;
  const V power = reinterpret_cast<V>(exponent + reinterpret_cast<Bits>(one));
  return x < C::lowest ? V{} : series * power;
}

// The same for finite x, a third faster in float: relative error at most 2e-7 by a polynomial fitted to the interval (3e-16 in
// double), exact at 0. Results end at exp(-86) or exp(-707) instead of at 0, so that nothing is denormal.
template <typename T>
inline typename Vec<T>::type exp_floored(typename Vec<T>::type x) {
  using V = typename Vec<T>::type;
  using C = exp_detail::Constants<T>;
  x = larger<T>(V{} + (C::lowest + 1), x);
  const V shifted = x * C::log2e + C::rounder;
  const V n = shifted - C::rounder;
  V series;
  if constexpr (std::is_same_v<T, float>) {
    const V r = x - n * 0x1.62e430p-1f;
    series = V{} + 0x1.0fa104p-7f;
    series = series * r + 0x1.574408p-5f;
    series = series * r + 0x1.555aa0p-3f;
    series = series * r + 0x1.fffdaep-2f;
    series = series * r + 0x1.fffff6p-1f;
    series = series * r + 1.0f;
  } else {
    const V r = x - n * C::ln2_high - n * C::ln2_low;
    series = V{} + exp_detail::one_over_factorial<T>(C::degree);
#pragma GCC unroll 16
    for (int i = C::degree - 1; i >= 0; --i) series = series * r + exp_detail::one_over_factorial<T>(i);
  }
  // Times 2^n, in the exponent's bits.
  return reinterpret_cast<V>(reinterpret_cast<Mask<T>>(series) +
                             (reinterpret_cast<Mask<T>>(shifted) << C::mantissa_bits));
}

// exp(-d) - 1 + d for |d| <= 1/2, by its Taylor series: nothing cancels.
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
