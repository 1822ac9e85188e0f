// Helpers of the launchers: device and stream of a tensor, scratch memory, and how to read a tensor.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <sstream>

#include "../cpu/tensors.h"
#include "logits.cuh"
#include "tuning.cuh"

// Where the files of the operators register them: for CUDA, or for the emulation of CUDA on the CPU.
#ifdef KDKERNELS_EMULATED
#define KDKERNELS_NAMESPACE kdkernels_emulated
#define KDKERNELS_DEVICE CPU
#else
#define KDKERNELS_NAMESPACE kdkernels
#define KDKERNELS_DEVICE CUDA
#endif

namespace kdkernels {

// Makes the tensor's device the current device while it exists, and finds PyTorch's current stream there.
class OnDevice {
 public:
#ifdef KDKERNELS_EMULATED
  explicit OnDevice(const Tensor&) {}
#else
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* current = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current) == AOTI_TORCH_SUCCESS,
                    "PyTorch names no current CUDA stream");
    stream = static_cast<Stream>(current);
  }
#endif
  Stream stream = {};

 private:
#ifndef KDKERNELS_EMULATED
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// Return the line of kTunings for the current device. KDKERNELS_TUNING replaces its six numbers, for measurements.
inline Tuning tuning() {
  Tuning chosen = kTunings[0];
#ifndef KDKERNELS_EMULATED
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  for (const Tuning& line : kTunings)
    if (line.capability <= 10 * major + minor) chosen = line;
#endif
  static const char* const trial = std::getenv("KDKERNELS_TUNING");
  if (!trial) return chosen;
  std::istringstream numbers(trial);
  for (int64_t* number : {&chosen.gram_blocks, &chosen.gram_depth, &chosen.product_blocks, &chosen.product_depth,
                          &chosen.error_blocks, &chosen.error_numbers})
    STD_TORCH_CHECK(numbers >> *number && *number > 0, "KDKERNELS_TUNING must be six positive numbers, got ", trial);
  return chosen;
}

inline Element element_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Element::float32;
    case ScalarType::Double:
      return Element::float64;
    case ScalarType::BFloat16:
      return Element::bfloat16;
    case ScalarType::Half:
      return Element::float16;
    default:
      STD_TORCH_CHECK(false, "expected float32, float64, bfloat16 or float16");
  }
}

inline Logits logits_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), element_of(tensor), tensor.stride(0), tensor.stride(1)};
}

template <typename T>
T* data_of(const Tensor& tensor) {
  return tensor.numel() ? tensor.mutable_data_ptr<T>() : nullptr;
}

// Return how many numbers T take the memory of `count` numbers E.
template <typename T, typename E>
int64_t numbers_for(int64_t count) {
  return (count * int64_t(sizeof(E)) + int64_t(sizeof(T)) - 1) / int64_t(sizeof(T));
}

// Return the threads of a block for `count` elements: whole warps, at most 512.
inline int threads_for(int64_t count, int64_t each) {
  int threads = kWarp;
  while (threads < 512 && threads * each < count) threads *= 2;
  return threads;
}

}  // namespace kdkernels
