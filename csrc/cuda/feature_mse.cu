#include "feature_mse.cuh"

#include "../checks/feature_mse.h"
#include "host.h"

namespace kdkernels {
namespace {

Maps maps_of(const Tensor& maps) {
  return {maps.const_data_ptr(), element_of(maps), int(maps.size(2)), int(maps.size(3)),
          maps.stride(0),        maps.stride(1),   maps.stride(2),    maps.stride(3)};
}

// Return whether maps have the memory order of the grid, without gaps, and an address at which neighbours can be read
// together.
bool lies_as(const Maps& maps, const Grid& grid, int64_t bytes) {
  const auto steps = [](int64_t size, int64_t stride, int64_t expected) { return size == 1 || stride == expected; };
  const int64_t c = grid.channels, h = grid.height, w = grid.width;
  const bool dense = grid.channels_last
                         ? steps(c, maps.channel, 1) && steps(w, maps.pixel, c) && steps(h, maps.line, c * w)
                         : steps(w, maps.pixel, 1) && steps(h, maps.line, w) && steps(c, maps.channel, h * w);
  return dense && maps.height == h && maps.width == w && maps.sample % 4 == 0 && grid.size() % 4 == 0 &&
         reinterpret_cast<uintptr_t>(maps.data) % std::min<int64_t>(4 * bytes, 16) == 0;
}

LayerPair pair_of(const Tensor& projected, const Tensor& target, int64_t number) {
  const Maps own = maps_of(projected), other = maps_of(target);
  const int64_t channels = projected.size(1), pixels = projected.size(2) * projected.size(3);
  const Grid grid = Grid::of(int(channels), std::min(own.height, other.height), std::min(own.width, other.width),
                             projected.stride(1) == 1 && channels > 1 && pixels > 1);
  const bool alike = lies_as(own, grid, projected.element_size()) && lies_as(other, grid, target.element_size());
  return {own, other, grid, alike, int(number)};
}

Weights weights_of(const Tensor& weights) {
  return {weights.const_data_ptr(), element_of(weights), int(weights.size(1)), int(weights.size(2)),
          weights.stride(0),        weights.stride(1),   weights.stride(2)};
}

template <typename T>
std::tuple<Tensor, Tensor> run(const std::vector<Tensor>& projected, const std::vector<Tensor>& targets,
                               const Tensor& weights, double scale) {
  const OnDevice device(weights);
  const int64_t batch = weights.size(0), count = projected.size(), entries = batch * count;
  std::vector<LayerPair> pairs;
  int64_t largest = 0;
  for (int64_t p = 0; p < count; ++p) {
    pairs.push_back(pair_of(projected[p], targets[p], p));
    largest = std::max<int64_t>(largest, pairs.back().grid.size());
  }
  const Tuning tuned = tuning();
  const int64_t parts = std::clamp<int64_t>((tuned.error_blocks + entries - 1) / entries, 1,
                                            (largest + tuned.error_numbers - 1) / tuned.error_numbers);
  Problems<LayerPair> problems;
  for (const LayerPair& pair : pairs) problems.push_back({pair, batch * parts});

  const Tensor partials = new_compact(weights, {entries * parts}, ScalarType::Double);
  const Tensor errors = new_compact(weights, {batch, weights.size(1), weights.size(2)}, kScalarType<T>);
  const Tensor loss = new_compact(weights, {}, kScalarType<T>);
  launch(error_kernel<T>, problems, kMapThreads, 0, device.stream, int(count), int(parts), data_of<double>(partials));
  launch(loss_kernel<T>, 1, kLossThreads, 0, device.stream, data_of<double>(partials), entries, int(parts), scale,
         weights_of(weights), data_of<T>(errors), data_of<T>(loss));
  return {loss, errors};
}

// A gradient of maps like `maps`, in the order of the grid.
Tensor new_gradient(const Tensor& maps, bool channels_last, bool wanted) {
  using torch::headeronly::MemoryFormat;
  if (!wanted) return new_compact(maps, {0});
  return torch::stable::empty(maps.sizes(), maps.scalar_type(), std::nullopt, maps.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

int64_t blocks_for(int64_t batch, int64_t size) { return batch * ((size + kNumbers - 1) / kNumbers); }

template <typename T>
std::vector<Tensor> run_backward(const Tensor& grad_loss, const std::vector<Tensor>& projected,
                                 const std::vector<Tensor>& targets, const Tensor& weights, double scale,
                                 const std::vector<int64_t>& wanted) {
  const OnDevice device(weights);
  const int64_t batch = weights.size(0), count = projected.size();
  std::vector<Tensor> grads(2 * count), grids;
  Problems<PairGradients<T>> gradients;
  Problems<Spreading<T>> spreadings;
  for (int64_t p = 0; p < count; ++p) {
    PairGradients<T> gradient{pair_of(projected[p], targets[p], p)};
    const Grid& grid = gradient.pair.grid;
    const auto add = [&](const Tensor& maps, Tensor& grad, bool want, const Maps& own, void*& direct, T sign) {
      grad = new_gradient(maps, grid.channels_last, want);
      if (!want) return;
      if (own.height == grid.height && own.width == grid.width) {
        direct = grad.mutable_data_ptr();
        return;
      }
      if (!gradient.of_grid) {
        grids.push_back(new_compact(weights, {batch * grid.size()}, kScalarType<T>));
        gradient.of_grid = data_of<T>(grids.back());
      }
      const Grid whole = Grid::of(grid.channels, own.height, own.width, grid.channels_last);
      spreadings.push_back({{gradient.of_grid, grid, whole, Divisor::of(own.height / grid.height),
                             Divisor::of(own.width / grid.width), sign, grad.mutable_data_ptr(), own.type},
                            blocks_for(batch, whole.size())});
    };
    add(projected[p], grads[p], wanted[p], gradient.pair.projected, gradient.of_projected, T(1));
    add(targets[p], grads[count + p], wanted[count + p], gradient.pair.target, gradient.of_target, T(-1));
    if (wanted[p] || wanted[count + p]) gradients.push_back({gradient, blocks_for(batch, grid.size())});
  }
  const Slope slope{grad_loss.const_data_ptr(), element_of(grad_loss), scale, weights_of(weights)};
  launch(pair_gradients_kernel<T>, gradients, kMapThreads, 0, device.stream, slope, int(count));
  launch(spread_kernel<T>, spreadings, kMapThreads, 0, device.stream);
  return grads;
}

}  // namespace

std::tuple<Tensor, Tensor> feature_mse(const std::vector<Tensor>& projected, const std::vector<Tensor>& targets,
                                       const Tensor& weights, double scale) {
  check_feature_mse(projected, targets, weights, scale);
  return any_double(projected) || any_double(targets) ? run<double>(projected, targets, weights, scale)
                                                      : run<float>(projected, targets, weights, scale);
}

std::vector<Tensor> feature_mse_backward(const Tensor& grad_loss, const std::vector<Tensor>& projected,
                                         const std::vector<Tensor>& targets, const Tensor& weights, double scale,
                                         const std::vector<int64_t>& wanted) {
  check_feature_mse_backward(grad_loss, projected, targets, weights, scale, wanted);
  return with_compute_type(grad_loss, [&](auto type) {
    return run_backward<decltype(type)>(grad_loss, projected, targets, weights, scale, wanted);
  });
}

}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(KDKERNELS_NAMESPACE, KDKERNELS_DEVICE, m) {
  m.impl("feature_mse", TORCH_BOX(&kdkernels::feature_mse));
  m.impl("feature_mse_backward", TORCH_BOX(&kdkernels::feature_mse_backward));
}
