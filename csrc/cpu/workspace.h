// Scratch memory that a thread keeps between calls, so that small problems do not pay for the allocator.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace kdkernels {

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Return the distance between lines of `length` elements. Lines at multiples of 1 KiB would compete for a few cache sets.
template <typename T>
constexpr int64_t spread(int64_t length) {
  return length * sizeof(T) % 1024 ? length : length + 64 / sizeof(T);
}

// Uninitialised memory on a cache-line boundary.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) : count_(count) {
    int64_t bytes;
    if (__builtin_mul_overflow(count, int64_t(sizeof(T)), &bytes) || bytes > kMostBytes) throw std::bad_alloc();
    bytes = round_up(bytes, 64);
    memory_.reset(static_cast<T*>(std::aligned_alloc(64, bytes ? bytes : 64)));
    if (!memory_) throw std::bad_alloc();
  }
  T* data() const { return memory_.get(); }
  int64_t size() const { return count_; }

 private:
  struct Free {
    void operator()(T* memory) const { std::free(memory); }
  };
  static constexpr int64_t kMostBytes = int64_t(1) << 62;
  std::unique_ptr<T[], Free> memory_;
  int64_t count_ = 0;
};

// The uses of a thread's scratch memory.
enum class Scratch {
  row,
  packed_a,
  packed_b,
  partial_sums,
  strip,
  product,
  image,
  patches,
  rows_x,
  rows_y,
  norms_x,
  norms_y,
  student_logits,
  teacher_logits,
  correlations,
  partial_gradients,
  keys_x,
  keys_y,
  norms_keys_x,
  norms_keys_y,
  gradient_x,
  gradient_y,
  gradient_keys_x,
  gradient_keys_y,
};

// Return the calling thread's buffer for `use`, with at least `count` elements. It is valid until the next call.
template <typename T, Scratch use>
T* workspace(int64_t count) {
  static thread_local Buffer<T> buffer;
  if (buffer.size() < count) {
    buffer = Buffer<T>();  // freed before the larger one is allocated
    buffer = Buffer<T>(count);
  }
  return buffer.data();
}

}  // namespace kdkernels
