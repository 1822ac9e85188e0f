// What one core computes in a second: exponentials of csrc/cpu/exp.h, and multiply-adds in registers.
#include "../csrc/cpu/exp.h"

using namespace kdkernels;

// Compute `rounds` times 4096 exponentials in 16 KiB, which stay in the first cache, and return how many they were.
extern "C" int64_t exponentials(int64_t rounds) {
  constexpr int64_t count = 4096, lanes = Vec<float>::size;
  alignas(64) float in[count], out[count];
  for (int64_t i = 0; i < count; ++i) in[i] = -20.0f * float(i) / count;
  for (int64_t round = 0; round < rounds; ++round) {
    for (int64_t i = 0; i < count; i += lanes) store<float>(out + i, exp2_nonpositive<float>(load<float>(in + i)));
    asm volatile("" : : "r"(out) : "memory");
  }
  return rounds * count;
}

// Compute `rounds` multiply-adds in each lane of ten vectors, and return how many they were. Two ports with a latency of four
// or five cycles are busy with eight to ten independent vectors. AVX2 has 16 registers, so there are no more than ten.
extern "C" int64_t multiply_adds(int64_t rounds) {
  constexpr int64_t vectors = 10, lanes = Vec<float>::size;
  typename Vec<float>::type sums[vectors] = {}, a{}, b{};
  a += 0.5f;
  b += 0.25f;
  asm volatile("" : "+x"(a), "+x"(b));  // the compiler must not know the values, or it computes equal vectors once
#pragma GCC unroll 10
  for (int64_t i = 0; i < vectors; ++i) asm volatile("" : "+x"(sums[i]));
  for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 10
    for (int64_t i = 0; i < vectors; ++i) sums[i] = sums[i] * a + b;
  float total = 0;
  for (int64_t i = 0; i < vectors; ++i) total += sums[i][0];
  return total > 0 ? rounds * vectors * lanes : 0;
}
