// Helpers for tensors: dispatch on the element type, and new outputs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace kdkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
inline constexpr ScalarType kScalarType = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

// Call f with a value of the element type.
template <typename F>
auto with_element_type(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float:
      return f(float());
    case ScalarType::Double:
      return f(double());
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16());
    case ScalarType::Half:
      return f(torch::headeronly::Half());
    default:
      STD_TORCH_CHECK(false, "expected float32, float64, bfloat16 or float16");
  }
}

template <typename F>
auto with_element_type(const Tensor& tensor, const F& f) {
  return with_element_type(tensor.scalar_type(), f);
}

// Call f with a value of the compute type: double for float64, otherwise float.
template <typename F>
auto with_compute_type(const Tensor& tensor, const F& f) {
  return tensor.scalar_type() == ScalarType::Double ? f(double()) : f(float());
}

inline bool any_double(const std::vector<Tensor>& tensors) {
  const auto is_double = [](const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Double; };
  return std::any_of(tensors.begin(), tensors.end(), is_double);
}

inline Tensor new_compact(const Tensor& like, const std::vector<int64_t>& shape,
                          std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_empty(like, shape, dtype);
}

// The tensor itself if it is contiguous, otherwise a copy that is.
inline Tensor compact(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

template <typename T>
Tensor new_scalar(const Tensor& like, double value) {
  const Tensor scalar = new_compact(like, {}, kScalarType<T>);
  *scalar.mutable_data_ptr<T>() = T(value);
  return scalar;
}

}  // namespace kdkernels
