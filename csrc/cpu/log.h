// Vectorised logarithm, for ratios that may be close to 1.
#pragma once

#include "lanes.h"

namespace kdkernels {

// log(x), and x - 1 - log(x) without cancellation where x is near 1.
template <typename T>
struct Logarithm {
  typename Vec<T>::type log, remainder;
};

// For normal x > 0, with an error of a few units in the last place. `above` is x - 1. The caller may know it to more digits
// than x has.
template <typename T>
inline Logarithm<T> logarithm(typename Vec<T>::type x, typename Vec<T>::type above) {
  using V = typename Vec<T>::type;
  constexpr bool single = std::is_same_v<T, float>;
  constexpr int mantissa_bits = single ? 23 : 52;
  constexpr int terms = single ? 5 : 12;
  constexpr T ln2 = T(0.693147180559945309417);
  const Mask<T> root = reinterpret_cast<Mask<T>>(V{} + T(0.70710678118654752440));
  // x = 2^k m with m from sqrt(1/2) to sqrt(2).
  const Mask<T> bits = reinterpret_cast<Mask<T>>(x) - root;
  const Mask<T> k = bits >> mantissa_bits;
  const V m = reinterpret_cast<V>(bits - (k << mantissa_bits) + root);
  const auto near_one = k == 0;
  const V y = near_one ? above : m - T(1);
  // log(1 + y) = 2 atanh(s) = 2s + rest, and y - 2s = y s.
  const V s = y / (T(2) + y), square = s * s;
  V rest = V{} + T(2) / T(2 * terms + 1);
#pragma GCC unroll 16
  for (int i = terms - 1; i >= 1; --i) rest = rest * square + T(2) / T(2 * i + 1);
  rest = rest * square * s;
  const V log = __builtin_convertvector(k, V) * ln2 + (s + s + rest);
  return {log, near_one ? y * s - rest : above - log};
}

}  // namespace kdkernels
