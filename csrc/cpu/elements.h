// Samples of any element type and strides, read as rows of numbers of one type.
#pragma once

#include <numeric>
#include <optional>
#include <vector>

#include "convert.h"
#include "tensors.h"
#include "view.h"

namespace kdkernels {

// The elements of each sample of a batch, in the order of the tensor's dimensions or in another order.
class Elements {
 public:
  int64_t samples, depth;

  explicit Elements(const Tensor& tensor) : Elements(tensor, dimensions(tensor)) {}

  Elements(const Tensor& tensor, const std::vector<int64_t>& order)
      : samples(tensor.size(0)),
        depth(tensor.numel() / tensor.size(0)),
        type_(tensor.scalar_type()),
        data_(static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()))),
        step_(tensor.stride(0)) {
    // Neighbouring dimensions become one dimension if one stride serves both.
    for (const int64_t d : order) {
      const Axis axis{tensor.size(d), tensor.stride(d)};
      if (axis.size == 1) continue;
      if (!axes_.empty() && axes_.back().stride == axis.size * axis.stride)
        axes_.back() = {axes_.back().size * axis.size, axis.stride};
      else
        axes_.push_back(axis);
    }
    if (axes_.empty()) axes_.push_back({1, 1});
  }

  // Return the samples x depth matrix in place, if its numbers have type T and a constant stride.
  template <typename T>
  std::optional<View<T>> evenly() const {
    if (type_ != kScalarType<T> || axes_.size() > 1) return std::nullopt;
    return View<T>{reinterpret_cast<const T*>(data_), step_, axes_[0].stride};
  }

  template <typename T>
  void read(int64_t sample, int64_t first, int64_t count, T* out) const {
    with_element_type(type_, [&](auto element) {
      using E = decltype(element);
      runs(sample, first, count, [&](int64_t done, int64_t length, int64_t place, int64_t stride) {
        widen(reinterpret_cast<const E*>(data_) + place, stride, length, out + done);
      });
    });
  }

  template <typename T>
  void write(int64_t sample, int64_t first, int64_t count, const T* source) const {
    with_element_type(type_, [&](auto element) {
      using E = decltype(element);
      runs(sample, first, count, [&](int64_t done, int64_t length, int64_t place, int64_t stride) {
        narrow(source + done, length, reinterpret_cast<E*>(data_) + place, stride);
      });
    });
  }

 private:
  struct Axis {
    int64_t size, stride;
  };

  static std::vector<int64_t> dimensions(const Tensor& tensor) {
    std::vector<int64_t> order(tensor.dim() - 1);
    std::iota(order.begin(), order.end(), 1);
    return order;
  }

  // Call f(done, length, place, stride) for evenly spaced runs of the elements [first, first + count) of a sample.
  template <typename F>
  void runs(int64_t sample, int64_t first, int64_t count, const F& f) const {
    const Axis inner = axes_.back();
    for (int64_t done = 0; done < count;) {
      int64_t rest = (first + done) / inner.size;
      const int64_t within = (first + done) % inner.size, length = std::min(inner.size - within, count - done);
      int64_t place = sample * step_ + within * inner.stride;
      for (auto axis = axes_.rbegin() + 1; axis != axes_.rend(); ++axis) {
        place += rest % axis->size * axis->stride;
        rest /= axis->size;
      }
      f(done, length, place, inner.stride);
      done += length;
    }
  }

  ScalarType type_;
  char* data_;
  int64_t step_;
  std::vector<Axis> axes_;
};

}  // namespace kdkernels
