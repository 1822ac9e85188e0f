// How the tests steer the emulation, and kernels that are wrong, which it must find out.
#include "device.cuh"

namespace {

// Each thread reads what the next one has written.
template <bool Wait>
__global__ void neighbour_kernel(const float* in, float* out) {
  SHARED_ARRAY(float, values, 64);
  values[threadIdx.x] = in[threadIdx.x];
  if constexpr (Wait) __syncthreads();
  out[threadIdx.x] = values[(threadIdx.x + 1) % blockDim.x];
}

// Rotates its values, again and again in one array: readers must be done before the next writers begin.
template <bool Wait>
__global__ void rotation_kernel(const float* in, float* out) {
  SHARED_ARRAY(float, values, 64);
  float value = in[threadIdx.x];
  for (int turn = 0; turn < 3; ++turn) {
    values[threadIdx.x] = value;
    __syncthreads();
    value = values[(threadIdx.x + 1) % blockDim.x];
    if constexpr (Wait) __syncthreads();
  }
  out[threadIdx.x] = value;
}

// Copies in the background, and reads before or after the copy has arrived.
template <bool Wait>
__global__ void copy_kernel(const float* in, float* out) {
  SHARED_ARRAY(float, values, 64);
  if (threadIdx.x % 4 == 0) kdkernels::copy_async(values + threadIdx.x, in + threadIdx.x, true);
  kdkernels::close_copies();
  if constexpr (Wait) {
    kdkernels::wait_copies<0>();
    __syncthreads();
  }
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void deadlock_kernel(const float* in, float* out) {
  if (threadIdx.x > 0) __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

}  // namespace

extern "C" {

void set_order(int order, uint64_t seed) {
  emulation::order = emulation::Order(order);
  emulation::generator.seed(seed);
}

int64_t launches() { return std::exchange(emulation::launches, 0); }
void only_count(bool only) { emulation::only_counted = only; }

// Runs one block of 64 threads; false if it could not finish.
bool run_example(const char* name, bool wait, const float* in, float* out) {
  const std::map<std::string, void (*)(const float*, float*)> kernels = {
      {"neighbour", wait ? neighbour_kernel<true> : neighbour_kernel<false>},
      {"rotation", wait ? rotation_kernel<true> : rotation_kernel<false>},
      {"copy", wait ? copy_kernel<true> : copy_kernel<false>},
      {"deadlock", deadlock_kernel},
  };
  try {
    kdkernels::launch(kernels.at(name), 1, 64, 0, {}, in, out);
    return true;
  } catch (const std::runtime_error&) {
    return false;
  }
}
}
