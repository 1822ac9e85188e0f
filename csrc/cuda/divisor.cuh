// Division of integers by a common divisor, because the hardware has no integer division.
#pragma once

#include "device.cuh"

namespace kdkernels {

// Divides numbers from 0 to 2^31 by a divisor that the host knows, with a multiplication (Granlund and Montgomery
// 1994).
struct Divisor {
  int value, shift;
  uint32_t multiplier;

  static Divisor of(int value) {
    int bits = 0;
    while ((int64_t(1) << bits) < value) ++bits;
    return {value, 31 + bits, uint32_t((uint64_t(1) << (31 + bits)) / value + 1)};
  }
  __device__ int quotient(int number) const { return int(uint64_t(number) * multiplier >> shift); }
  __device__ int remainder(int number) const { return number - quotient(number) * value; }
};

}  // namespace kdkernels
