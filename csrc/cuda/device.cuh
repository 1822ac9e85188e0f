// What kernels ask of the device. tests/emulation compiles the same kernels for the CPU, with its own version of the first half.
#pragma once

#ifdef KDKERNELS_EMULATED
#include "emulation.h"
#else
#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

// An array in shared memory.
#define SHARED_ARRAY(T, name, count) __shared__ __align__(16) T name[count]

namespace kdkernels {

using Stream = cudaStream_t;

// The shared memory whose size the launch names.
__device__ inline char* dynamic_shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes, Stream stream,
            const Arguments&... arguments) {
  if (blocks == 0) return;
  STD_TORCH_CHECK(blocks < int64_t(1) << 31, "a CUDA grid of ", blocks, " blocks is too large");
  if (shared_bytes > 48 * 1024)
    cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                         shared_bytes);
  // clang-format off
  kernel<<<unsigned(blocks), threads, shared_bytes, stream>>>(arguments...);
  // clang-format on
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "a CUDA kernel could not be launched: ", cudaGetErrorString(error));
}

// Copy `Bytes` to shared memory in the background, or zeros unless `valid`. Copies are waited for in groups.
template <int Bytes>
__device__ inline void copy_async(void* shared, const void* global, bool valid) {
  const unsigned address = unsigned(__cvta_generic_to_shared(shared));
  const int size = valid ? Bytes : 0;
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(size) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(global), "n"(Bytes), "r"(size)
                 : "memory");
}

__device__ inline void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait for this thread's copies but for those of the last `Open` groups.
template <int Open>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Open) : "memory");
}

}  // namespace kdkernels
#endif

namespace kdkernels {

constexpr int kWarp = 32;

template <typename T>
struct Sum {
  __device__ T operator()(T a, T b) const { return a + b; }
};

template <typename T>
struct Largest {
  __device__ T operator()(T a, T b) const { return a > b ? a : b; }
};

// Every thread of the warp gets the combination of all their values.
template <typename T, typename Combine>
__device__ T warp_reduce(T value, Combine combine) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value = combine(value, __shfl_xor_sync(0xffffffff, value, distance));
  return value;
}

// The same for the block, whose size is a multiple of the warp's.
template <typename T, typename Combine>
__device__ T block_reduce(T value, Combine combine) {
  SHARED_ARRAY(T, of_warps, kWarp);
  value = warp_reduce(value, combine);
  const int warps = blockDim.x / kWarp;
  if (warps == 1) return value;
  __syncthreads();  // an earlier reduction may still be read
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = of_warps[0];
  for (int warp = 1; warp < warps; ++warp) value = combine(value, of_warps[warp]);
  return value;
}

}  // namespace kdkernels
