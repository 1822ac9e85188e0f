// Emulates CUDA threads on the CPU, for tests. The threads of a block are fibres of one operating-system thread. They
// run in a chosen order, and switch only where they wait for each other. Shared memory begins as NaN. An asynchronous
// copy arrives when a thread waits for it, and its destination is NaN until then. So a missing barrier changes the
// result.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

using std::max;
using std::min;

namespace emulation {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

enum class Order { forward, reverse, random };

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 128 * 1024;

// Threads that wait until all of them have arrived.
struct Barrier {
  int arrived = 0;
  uint64_t passed = 0;
};

struct Copy {
  char* to;
  const char* from;  // null for zeros
};

struct Fibre {
  ucontext_t beginning;
  jmp_buf place;  // where it stopped; longjmp is much faster than swapcontext, which makes a system call
  bool begun = false;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool done = false;
  const Barrier* waits_for = nullptr;
  uint64_t until = 0;
  std::vector<std::vector<Copy>> copies;  // by group; the last group is open

  bool ready() const { return !done && (!waits_for || waits_for->passed >= until); }
};

struct Warp {
  Barrier barrier;
  const void* published[kWarpSize];
};

inline Order order = Order::forward;
inline std::mt19937_64 generator;
inline int64_t launches = 0;
inline bool only_counted = false;  // launches only count

// The block that is running.
inline jmp_buf scheduler;
inline std::vector<Fibre> fibres;
inline std::vector<Warp> warps;
inline Barrier block_barrier;
inline std::map<const void*, std::vector<char>> shared_arrays;  // by the source location that declares them
inline std::vector<char> dynamic_shared;
inline const std::function<void()>* body;
inline int current;  // thread
inline std::exception_ptr failure;

}  // namespace emulation

inline emulation::Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

inline void poison(void* memory, size_t bytes) { std::memset(memory, 0xff, bytes); }

inline void* shared_array(const void* site, size_t bytes) {
  auto [entry, is_new] = shared_arrays.try_emplace(site);
  if (is_new) {
    entry->second.resize(bytes);
    poison(entry->second.data(), bytes);
  }
  return entry->second.data();
}

inline void give_way() {
  if (_setjmp(fibres[current].place) == 0) _longjmp(scheduler, 1);
}

[[gnu::noinline]] inline void resume(Fibre& fibre) {
  if (_setjmp(scheduler) != 0) return;
  if (std::exchange(fibre.begun, true)) _longjmp(fibre.place, 1);
  setcontext(&fibre.beginning);
}

inline void wait(Barrier& barrier, int threads) {
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.passed;
    return;
  }
  Fibre& self = fibres[current];
  self.waits_for = &barrier;
  self.until = barrier.passed + 1;
  give_way();
}

inline void wait_for_warp() { wait(warps[current / kWarpSize].barrier, kWarpSize); }

// The value that lane `lane` of the calling thread's warp shows to the other lanes until the next wait_for_warp().
template <typename T>
const T& shown_by(int lane) {
  return *static_cast<const T*>(warps[current / kWarpSize].published[lane]);
}

template <typename T>
void show(const T& value) {
  warps[current / kWarpSize].published[current % kWarpSize] = &value;
  wait_for_warp();
}

inline void enter() {
  try {
    (*body)();
  } catch (...) {
    failure = std::current_exception();
  }
  fibres[current].done = true;
  give_way();
}

inline std::vector<int64_t> permutation(int64_t count) {
  std::vector<int64_t> indices(count);
  std::iota(indices.begin(), indices.end(), 0);
  if (order == Order::reverse) std::reverse(indices.begin(), indices.end());
  if (order == Order::random) std::shuffle(indices.begin(), indices.end(), generator);
  return indices;
}

inline void run_block(int64_t block, int threads, int shared_bytes) {
  blockIdx.x = unsigned(block);
  block_barrier = {};
  warps.assign(threads / kWarpSize, {});
  shared_arrays.clear();
  dynamic_shared.resize(shared_bytes + 16);
  poison(dynamic_shared.data(), dynamic_shared.size());
  if (int(fibres.size()) < threads) fibres.resize(threads);
  for (int thread = 0; thread < threads; ++thread) {
    Fibre& fibre = fibres[thread];
    fibre.done = false;
    fibre.waits_for = nullptr;
    fibre.copies.assign(1, {});
    fibre.begun = false;
    getcontext(&fibre.beginning);
    fibre.beginning.uc_stack.ss_sp = fibre.stack.get();
    fibre.beginning.uc_stack.ss_size = kStackBytes;
    makecontext(&fibre.beginning, enter, 0);
  }
  for (int done = 0; done < threads;) {
    bool progress = false;
    for (const int64_t thread : permutation(threads)) {
      Fibre& fibre = fibres[thread];
      if (!fibre.ready()) continue;
      fibre.waits_for = nullptr;
      current = int(thread);
      threadIdx.x = unsigned(thread);
      resume(fibre);
      progress = true;
      if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
      done += fibre.done;
    }
    if (!progress) throw std::runtime_error("a barrier is not reached by all of its threads");
  }
  size_t shared = shared_bytes;
  for (const auto& [site, array] : shared_arrays) shared += array.size();
  if (shared > 48 * 1024 && shared_bytes <= kdkernels::kUnaskedBytes)
    throw std::runtime_error("a block has more than 48 KiB of shared memory, for which nobody has asked");
}

template <typename F>
void run_grid(int64_t blocks, int threads, int shared_bytes, const F& f) {
  if (threads % kWarpSize || threads > 1024) throw std::runtime_error("a block is 1 to 32 whole warps");
  const std::function<void()> function = f;
  body = &function;
  blockDim = {unsigned(threads), 1, 1};
  gridDim = {unsigned(blocks), 1, 1};
  ++launches;
  if (only_counted) return;
  for (const int64_t block : permutation(blocks)) run_block(block, threads, shared_bytes);
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::block_barrier, int(blockDim.x)); }
inline void __syncwarp() { emulation::wait_for_warp(); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  if (mask != 0xffffffff) throw std::runtime_error("shuffles are of whole warps");
  emulation::show(value);
  const T result = emulation::shown_by<T>(emulation::current % emulation::kWarpSize ^ distance);
  emulation::wait_for_warp();
  return result;
}

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

namespace emulation {

// The bits of an operand (a number or a pair) that a tensor core reads, and the bits of a sum that it keeps.
inline std::array<double, 1> operand(double x) { return {x}; }
template <typename E>
std::array<double, 2> operand(const kdkernels::HalfPair<E>& x) {
  return {double(float(x.numbers[0])), double(float(x.numbers[1]))};
}
template <typename U>
using Operand = decltype(operand(U()));

inline float accumulated(double sum, float) {
  const float nearest = float(sum);
  return std::abs(double(nearest)) > std::abs(sum) ? std::nextafter(nearest, 0.0f) : nearest;
}
inline double accumulated(double sum, double) { return sum; }

}  // namespace emulation

#define SHARED_ARRAY(T, name, count) \
  static const char name##_site = 0; \
  T* const name = static_cast<T*>(emulation::shared_array(&name##_site, sizeof(T) * (count)))

namespace kdkernels {

using Stream = int;
constexpr int kWarp = emulation::kWarpSize;

inline char* dynamic_shared_memory() {
  char* memory = emulation::dynamic_shared.data();
  return memory + (16 - reinterpret_cast<uintptr_t>(memory) % 16) % 16;
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes, Stream,
            const Arguments&... arguments) {
  const std::tuple<std::decay_t<Parameters>...> parameters(arguments...);
  if (blocks) emulation::run_grid(blocks, threads, shared_bytes, [&] { std::apply(kernel, parameters); });
}

inline float fast_exp2(float x) {
  const float power = std::exp2(x);
  return power < std::numeric_limits<float>::min() ? 0 : power;
}

inline float fast_reciprocal(float x) { return 1 / x; }

inline void copy_async(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || (valid && reinterpret_cast<uintptr_t>(global) % 16))
    throw std::runtime_error("a copy in the background is not aligned");
  emulation::poison(shared, 16);
  emulation::fibres[emulation::current].copies.back().push_back(
      {static_cast<char*>(shared), valid ? static_cast<const char*>(global) : nullptr});
}

inline void close_copies() { emulation::fibres[emulation::current].copies.emplace_back(); }

template <int Open>
void wait_copies() {
  auto& groups = emulation::fibres[emulation::current].copies;
  for (size_t group = 0; group + 1 + Open < groups.size(); ++group) {
    for (const emulation::Copy& copy : groups[group])
      copy.from ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
    groups[group].clear();
  }
}

inline unsigned bfloat16_pair(float low, float high) { return BFloat16(low).x | unsigned(BFloat16(high).x) << 16; }

template <bool Transposed, typename E>
void read_matrices(HalfPair<E> (&pairs)[4], const E* line) {
  if (reinterpret_cast<uintptr_t>(line) % 16) throw std::runtime_error("a line of a matrix is not aligned");
  emulation::show(line);
  const int lane = emulation::current % kWarp, g = lane / 4, t = lane % 4;
  for (int matrix = 0; matrix < 4; ++matrix)
    for (int e = 0; e < 2; ++e) {
      const int from = Transposed ? 2 * t + e : g;
      pairs[matrix].numbers[e] = emulation::shown_by<const E*>(8 * matrix + from)[Transposed ? g : 2 * t + e];
    }
  emulation::wait_for_warp();
}

// Products of a warp. csrc/cuda/device.cuh describes the layout over the lanes.
template <typename T, typename U, int M, int N>
void multiply(T (&c)[M][N][4], const U (&a)[M][4], const U (&b)[N][2]) {
  struct Operands {
    emulation::Operand<U> a[M][4], b[N][2];
  } own;
  for (int i = 0; i < M; ++i)
    for (int e = 0; e < 4; ++e) own.a[i][e] = emulation::operand(a[i][e]);
  for (int j = 0; j < N; ++j)
    for (int e = 0; e < 2; ++e) own.b[j][e] = emulation::operand(b[j][e]);
  emulation::show(own);
  const int lane = emulation::current % kWarp, g = lane / 4, t = lane % 4;
  double sums[M][N][4];
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) std::copy_n(c[i][j], 4, sums[i][j]);
  for (int k = 0; k < 8; ++k) {
    const auto& of_row = emulation::shown_by<Operands>(4 * g + k % 4);
    const auto& left = emulation::shown_by<Operands>(8 * t + k % 4);
    const auto& right = emulation::shown_by<Operands>(8 * t + 4 + k % 4);
    for (int i = 0; i < M; ++i)
      for (int j = 0; j < N; ++j)
        for (int e = 0; e < 4; ++e)
          for (size_t number = 0; number < of_row.a[i][0].size(); ++number)
            sums[i][j][e] += of_row.a[i][e / 2 + k / 4 * 2][number] * (e % 2 ? right : left).b[j][k / 4][number];
  }
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j)
      for (int e = 0; e < 4; ++e) c[i][j][e] = emulation::accumulated(sums[i][j][e], T());
  emulation::wait_for_warp();
}

}  // namespace kdkernels
