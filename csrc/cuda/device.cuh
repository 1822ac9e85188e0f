// Device functions of the kernels. tests/emulation compiles the same kernels for the CPU, with its own version of the
// first half.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace kdkernels {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// The shared memory that a launch may name without asking for more. A kernel has 48 KiB, and its own arrays take the
// rest.
constexpr int kUnaskedBytes = 47 * 1024;

// Two half-precision neighbours.
template <typename E>
struct alignas(4) HalfPair {
  E numbers[2];
};

}  // namespace kdkernels

#ifdef KDKERNELS_EMULATED
#include "emulation.h"
#else
#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <type_traits>

// An array in shared memory.
#define SHARED_ARRAY(T, name, count) __shared__ __align__(16) T name[count]

namespace kdkernels {

using Stream = cudaStream_t;
constexpr int kWarp = 32;

// The dynamic shared memory of the launch.
__device__ inline char* dynamic_shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes, Stream stream,
            const Arguments&... arguments) {
  if (blocks == 0) return;
  STD_TORCH_CHECK(blocks < int64_t(1) << 31, "a CUDA grid of ", blocks, " blocks is too large");
  if (shared_bytes > kUnaskedBytes)
    cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                         shared_bytes);
  // clang-format off
  kernel<<<unsigned(blocks), threads, shared_bytes, stream>>>(arguments...);
  // clang-format on
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "a CUDA kernel could not be launched: ", cudaGetErrorString(error));
}

// 2^x from the special function units, with a relative error of 2^-22. It is 0 if the result is not a normal number.
__device__ inline float fast_exp2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// 1 / x, with a relative error of 2^-23.
__device__ inline float fast_reciprocal(float x) {
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(x));
  return reciprocal;
}

// Begin an asynchronous copy of 16 bytes to shared memory, or of zeros unless `valid`. Threads wait for copies in groups.
__device__ inline void copy_async(void* shared, const void* global, bool valid) {
  const unsigned address = unsigned(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ inline void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait for this thread's copies, except the last `Open` groups.
template <int Open>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Open) : "memory");
}

// Two numbers as bfloat16. The first one has the lower bits.
__device__ inline unsigned bfloat16_pair(float low, float high) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Read four matrices of 8 x 8 from shared memory. Lanes 8 i to 8 i + 7 give the addresses of the lines of matrix i. Lane
// 4 g + t receives the numbers 2 t and 2 t + 1 of line g, or of column g if the matrices are transposed.
template <bool Transposed, typename E>
__device__ inline void read_matrices(HalfPair<E> (&pairs)[4], const E* line) {
  const unsigned address = unsigned(__cvta_generic_to_shared(line));
  unsigned (&bits)[4] = reinterpret_cast<unsigned (&)[4]>(pairs);
  if constexpr (Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits[0]), "=r"(bits[1]), "=r"(bits[2]), "=r"(bits[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits[0]), "=r"(bits[1]), "=r"(bits[2]), "=r"(bits[3])
                 : "r"(address)
                 : "memory");
}

// A product of a warp on tensor cores: c += a b, where a is 16 M x 16 and b is 16 x 8 N. Each row of a and each column of
// b has 8 pairs of neighbours. Lane 4 g + t holds the pairs (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4) of each 16 rows
// of a; (t, g), (t + 4, g) of each 8 columns of b; and the numbers (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1)
// of each 16 x 8 block of c. Products are exact, and sums are truncated.
template <typename E, int M, int N>
__device__ inline void multiply(float (&c)[M][N][4], const HalfPair<E> (&a)[M][4], const HalfPair<E> (&b)[N][2]) {
  const auto bits = [](const HalfPair<E>& pair) { return *reinterpret_cast<const unsigned*>(&pair); };
#pragma unroll
  for (int i = 0; i < M; ++i)
#pragma unroll
    for (int j = 0; j < N; ++j) {
      float (&sums)[4] = c[i][j];
#define MULTIPLY(type)                                                                                      \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                                \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                \
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                          \
      : "r"(bits(a[i][0])), "r"(bits(a[i][1])), "r"(bits(a[i][2])), "r"(bits(a[i][3])), "r"(bits(b[j][0])), \
        "r"(bits(b[j][1])))
      if constexpr (std::is_same_v<E, Half>)
        MULTIPLY("f16");
      else
        MULTIPLY("bf16");
#undef MULTIPLY
    }
}

// The same in float64, with numbers in place of pairs, in four products of 8 x 4 by 4 x 8.
template <int M, int N>
__device__ inline void multiply(double (&c)[M][N][4], const double (&a)[M][4], const double (&b)[N][2]) {
#pragma unroll
  for (int i = 0; i < M; ++i)
#pragma unroll
    for (int j = 0; j < N; ++j)
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const int half = part % 2, k = part / 2;
        asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
            : "+d"(c[i][j][2 * half]), "+d"(c[i][j][2 * half + 1])
            : "d"(a[i][half + 2 * k]), "d"(b[j][k]));
      }
}

}  // namespace kdkernels
#endif

namespace kdkernels {

// Not inlined, because no unit computes it and its code is long.
__device__ __noinline__ inline double fast_exp2(double x) { return exp2(x); }

__device__ inline double fast_reciprocal(double x) { return 1 / x; }

template <typename T>
struct Sum {
  __device__ T operator()(T a, T b) const { return a + b; }
};

template <typename T>
struct Largest {
  __device__ T operator()(T a, T b) const { return a > b ? a : b; }
};

// Combine the values of all threads of the warp. Every thread gets the result.
template <typename T, typename Combine>
__device__ T warp_reduce(T value, Combine combine) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value = combine(value, __shfl_xor_sync(0xffffffff, value, distance));
  return value;
}

// The same for the block. Its size is a multiple of the warp size.
template <typename T, typename Combine>
__device__ T block_reduce(T value, Combine combine) {
  SHARED_ARRAY(T, of_warps, kWarp);
  value = warp_reduce(value, combine);
  const int warps = blockDim.x / kWarp;
  if (warps == 1) return value;
  __syncthreads();  // threads may still read an earlier reduction
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = of_warps[0];
  for (int warp = 1; warp < warps; ++warp) value = combine(value, of_warps[warp]);
  return value;
}

}  // namespace kdkernels
