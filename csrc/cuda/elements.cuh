// Elements of any float type, read and written as numbers of the compute type. One kernel serves every dtype.
#pragma once

#include "device.cuh"

namespace kdkernels {

enum class Element : int { float32, float64, bfloat16, float16 };

template <typename E>
inline constexpr Element kElement = Element::float32;
template <>
inline constexpr Element kElement<double> = Element::float64;
template <>
inline constexpr Element kElement<BFloat16> = Element::bfloat16;
template <>
inline constexpr Element kElement<Half> = Element::float16;

template <typename E>
inline constexpr bool kIsHalf = sizeof(E) == 2;

// The compute type of products of numbers E.
template <typename E>
using Computed = std::conditional_t<std::is_same_v<E, double>, double, float>;

// Calls f with a number of the type.
template <typename F>
__device__ auto with_type(Element type, const F& f) {
  switch (type) {
    case Element::float64:
      return f(double());
    case Element::bfloat16:
      return f(BFloat16());
    case Element::float16:
      return f(Half());
    default:
      return f(float());
  }
}

template <typename To, typename From>
__device__ To number(From from) {
  if constexpr (sizeof(From) == 2)
    return To(float(from));
  else
    return To(from);
}

template <typename T>
__device__ T read(const void* data, Element type, int64_t offset) {
  return with_type(type, [&](auto element) { return number<T>(static_cast<const decltype(element)*>(data)[offset]); });
}

template <typename T>
__device__ void write(void* data, Element type, int64_t offset, T value) {
  with_type(type,
            [&](auto element) { static_cast<decltype(element)*>(data)[offset] = number<decltype(element)>(value); });
}

// The power of two that scales a row to a norm between 128 and 256. There, half precision holds all numbers that
// matter.
__device__ inline double balance(double norm) {
  int exponent;
  frexp(norm, &exponent);
  return ldexp(1.0, 8 - exponent);
}

// Neighbours whose address is a multiple of their size, or of 16 bytes.
template <typename E, int N>
struct alignas(N * sizeof(E) < 16 ? N * sizeof(E) : 16) Neighbours {
  E elements[N];
};

template <typename T, int N>
__device__ void read_together(const void* data, Element type, int64_t offset, T (&values)[N]) {
  with_type(type, [&](auto element) {
    using E = decltype(element);
    const auto together = *reinterpret_cast<const Neighbours<E, N>*>(static_cast<const E*>(data) + offset);
    for (int i = 0; i < N; ++i) values[i] = number<T>(together.elements[i]);
  });
}

template <typename T, int N>
__device__ void write_together(void* data, Element type, int64_t offset, const T (&values)[N]) {
  with_type(type, [&](auto element) {
    using E = decltype(element);
    Neighbours<E, N> together;
    for (int i = 0; i < N; ++i) together.elements[i] = number<E>(values[i]);
    *reinterpret_cast<Neighbours<E, N>*>(static_cast<E*>(data) + offset) = together;
  });
}

}  // namespace kdkernels
