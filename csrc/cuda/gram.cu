#include "gram.cuh"

#include <limits>

#include "../checks/gram.h"
#include "host.h"

namespace kdkernels {
namespace {

constexpr int64_t kDeepest = std::numeric_limits<int>::max() - kTile;

struct Axis {
  int64_t size = 1, stride = 0;
};

// A sample's dimensions from the last to the first. Neighbouring dimensions that one stride serves become one.
std::vector<Axis> axes_of(const Tensor& layer) {
  std::vector<Axis> axes;
  for (int64_t d = layer.dim() - 1; d > 0; --d) {
    if (layer.size(d) == 1) continue;
    if (!axes.empty() && layer.stride(d) == axes.back().size * axes.back().stride)
      axes.back().size *= layer.size(d);
    else
      axes.push_back({layer.size(d), layer.stride(d)});
  }
  return axes;
}

template <typename E>
Features<E> features_of(const Tensor& layer) {
  constexpr int64_t together = 16 / sizeof(E);
  const int64_t samples = layer.size(0), depth = layer.numel() / samples;
  std::vector<Axis> axes = axes_of(layer);
  const bool vectors = element_of(layer) == kElement<E> && axes.size() == 1 && axes[0].stride == 1 &&
                       depth % together == 0 && layer.stride(0) % together == 0 && is_short(layer.stride(0)) &&
                       reinterpret_cast<uintptr_t>(layer.const_data_ptr()) % 16 == 0;
  axes.resize(3);
  return {layer.const_data_ptr(), element_of(layer), vectors,        int(depth),     int(axes[1].size),
          int(axes[0].size),      layer.stride(0),   axes[2].stride, axes[1].stride, axes[0].stride};
}

// Layers that can be read in place. Layers with more than three strides are copied.
std::vector<Tensor> readable(const std::vector<Tensor>& features) {
  std::vector<Tensor> layers;
  for (const Tensor& layer : features)
    layers.push_back(axes_of(layer).size() <= 3 ? layer : torch::stable::contiguous(layer));
  return layers;
}

// For compute type T, call f with a value of each element type and the layers of this type. In float64, all layers are
// read as float64.
template <typename T, typename F>
void for_each_type(const std::vector<Tensor>& layers, const F& f) {
  const auto those_of = [&](auto number) {
    std::vector<size_t> own;
    for (size_t l = 0; l < layers.size(); ++l)
      if (std::is_same_v<T, double> || element_of(layers[l]) == kElement<decltype(number)>) own.push_back(l);
    if (!own.empty()) f(number, own);
  };
  if constexpr (std::is_same_v<T, double>) {
    those_of(double());
  } else {
    those_of(float());
    those_of(BFloat16());
    those_of(Half());
  }
}

template <typename T>
Tensor run_gram(const std::vector<Tensor>& features, bool tf32) {
  const OnDevice device(features[0]);
  const std::vector<Tensor> layers = readable(features);
  const int64_t count = layers.size(), batch = layers[0].size(0), in_a_part = triangle(tiles(batch), tiles(batch));
  const Tensor result = new_compact(layers[0], {count, batch, batch}, kScalarType<T>);

  int64_t total = 0;
  for (const Tensor& layer : layers) total += layer.numel() / batch;
  const Tuning tuned = tuning();
  const int64_t length =
      std::clamp<int64_t>(tiles(total * in_a_part / tuned.gram_blocks) * int64_t(kTile), tuned.gram_depth, kDeepest);
  const auto parts_of = [&](int64_t l) { return (layers[l].numel() / batch + length - 1) / length; };
  std::vector<int64_t> first_tile(1);  // the first tile of each layer's parts
  for (int64_t l = 0; l < count; ++l)
    first_tile.push_back(first_tile.back() + (parts_of(l) > 1 ? parts_of(l) * in_a_part : 0));
  const Tensor memory = new_compact(result, {first_tile.back() * kTile * kTile});
  const auto tiles_of = [&](int64_t l) { return data_of<T>(memory) + first_tile[l] * kTile * kTile; };
  const auto matrix_of = [&](int64_t l) { return data_of<T>(result) + l * batch * batch; };

  for_each_type<T>(layers, [&](auto number, const std::vector<size_t>& own) {
    using E = decltype(number);
    Problems<Similarity<E>> problems;
    for (const size_t l : own) {
      T* const out = parts_of(l) > 1 ? tiles_of(l) : matrix_of(l);
      problems.push_back({{features_of<E>(layers[l]), int(parts_of(l)), int(length), out}, parts_of(l) * in_a_part});
    }
    launch(similarity_kernel<E>, problems, kTileThreads, kTileBytes<T, true, true, E>, device.stream, int(batch), tf32);
  });

  Problems<Parts<T>> sums;
  for (int64_t l = 0; l < count; ++l)
    if (parts_of(l) > 1)
      sums.push_back({{tiles_of(l), parts_of(l), matrix_of(l)}, in_a_part * (kTile * kTile / kPartEntries)});
  launch(add_parts_kernel<T>, sums, kPartEntries * kPartLines, 0, device.stream, int(batch));
  return result;
}

// Compute (dA + dAᵀ) F, and store it in the features' type.
template <typename T>
std::vector<Tensor> run_backward(const Tensor& grad, const std::vector<Tensor>& features, bool tf32) {
  const OnDevice device(grad);
  const std::vector<Tensor> layers = readable(features);
  const int64_t count = layers.size(), batch = layers[0].size(0), area = batch * batch;
  const Tensor sums = new_compact(grad, {count, batch, batch});
  launch(add_transposed_kernel<T>, count * batch, threads_for(batch, 1), 0, device.stream, grad.const_data_ptr<T>(),
         grad.stride(0), grad.stride(1), grad.stride(2), int(batch), data_of<T>(sums));

  std::vector<Tensor> grads;
  for (const Tensor& layer : layers) grads.push_back(new_compact(layer, {batch, layer.numel() / batch}));
  for_each_type<T>(layers, [&](auto number, const std::vector<size_t>& own) {
    using E = decltype(number);
    Problems<FeatureGradient<E>> problems;
    for (const size_t l : own) {
      const Matrix<T> of_layer{data_of<T>(sums) + l * area, batch, batch * sizeof(T) % 16 == 0};
      const Features<E> factors = features_of<E>(layers[l]);
      problems.push_back(
          {{of_layer, factors, grads[l].mutable_data_ptr()}, int64_t(tiles(batch)) * tiles(factors.depth)});
    }
    launch(feature_gradient_kernel<E>, problems, kTileThreads, kTileBytes<T, true, false, T, E>, device.stream,
           int(batch), tf32);
  });
  return grads;
}

}  // namespace

Tensor gram(const std::vector<Tensor>& features, bool tf32) {
  check_gram(features);
  return any_double(features) ? run_gram<double>(features, tf32) : run_gram<float>(features, tf32);
}

std::vector<Tensor> gram_backward(const Tensor& grad, const std::vector<Tensor>& features, bool tf32) {
  check_gram_backward(grad, features);
  return with_compute_type(grad, [&](auto type) { return run_backward<decltype(type)>(grad, features, tf32); });
}

}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(KDKERNELS_NAMESPACE, KDKERNELS_DEVICE, m) {
  m.impl("gram", TORCH_BOX(&kdkernels::gram));
  m.impl("gram_backward", TORCH_BOX(&kdkernels::gram_backward));
}
