#include "patches.h"

#include "../checks/patches.h"

namespace kdkernels {

template <typename T, typename E>
Cut<T> Patching<T, E>::cut(const Shape& s, int64_t k, const Mask& mask, bool resize, const Tensor& like) {
  const int64_t patch_height = resize ? (s.height + k - 1) / k : s.height / k;
  const int64_t patch_width = resize ? (s.width + k - 1) / k : s.width / k;
  Cut<T> cut{int(s.channels), int(s.height), int(s.width), int(k)};
  cut.patch_height = Divisor::of(int(patch_height));
  cut.patch_width = Divisor::of(int(patch_width));
  cut.resized = patch_height * k != s.height || patch_width * k != s.width;
  cut.pixel_major = s.channels_last && !mask.weights && !cut.resized;
  cut.inner = Divisor::of(cut.pixel_major ? cut.channels : cut.patch_area());
  if (!mask.weights) return cut;

  const Tensor& weights = *mask.weights;
  memory_.push_back(new_compact(like, {s.images, s.height, s.width}, kScalarType<T>));
  T* resampled = data_of<T>(memory_.back());
  Box* boxes = nullptr;
  if (mask.threshold) {
    memory_.push_back(new_compact(like, {s.images, 4}, ScalarType::Int));
    boxes = reinterpret_cast<Box*>(data_of<int>(memory_.back()));
  }
  masks_.push_back({{weights.const_data_ptr(), element_of(weights), weights.stride(0), weights.stride(1),
                     weights.stride(2), int(weights.size(1)), int(weights.size(2)), cut.height, cut.width,
                     mask.threshold.value_or(0), resampled, boxes},
                    s.images});
  cut.mask = resampled;
  cut.boxes = boxes;
  return cut;
}

template <typename T, typename E>
void Patching<T, E>::pack(const Cut<T>& cut, const Tensor& features, E* rows, T* norms, T* factors, double eps) {
  packings_.push_back({{cut,
                        features.const_data_ptr(),
                        element_of(features),
                        {features.stride(0), features.stride(1), features.stride(2), features.stride(3)},
                        eps,
                        rows,
                        norms,
                        factors},
                       features.size(0) * cut.positions()});
}

template <typename T, typename E>
void Patching<T, E>::denormalise(const Cut<T>& cut, int64_t images, const T* grad, const T* rows, const T* norms,
                                 T* out) {
  projections_.push_back({{grad, rows, norms, nullptr, out, cut.length()}, images * cut.positions()});
}

template <typename T, typename E>
Tensor Patching<T, E>::unpack(const Cut<T>& cut, const Shape& s, const T* grad, const Tensor* scale,
                              const Tensor& like) {
  using torch::headeronly::MemoryFormat;
  const Tensor maps =
      torch::stable::empty({s.images, s.channels, s.height, s.width}, kScalarType<T>, std::nullopt, like.device(),
                           std::nullopt, s.channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  const int64_t size = s.channels * s.height * s.width;
  unpackings_.push_back(
      {{cut, s.channels_last, Divisor::of(s.channels_last ? cut.channels : cut.area()), Divisor::of(cut.width), grad,
        scale ? scale->const_data_ptr() : nullptr, scale ? element_of(*scale) : Element::float32, data_of<T>(maps)},
       s.images * ((size + kPixels - 1) / kPixels)});
  return maps;
}

template <typename T, typename E>
void Patching<T, E>::run() {
  int longest = 0;
  for (const auto& [problem, blocks] : packings_) longest = std::max(longest, problem.cut.length());
  for (const auto& [problem, blocks] : projections_) longest = std::max(longest, problem.length);
  const int threads = std::min(threads_for(longest, 4), kPatchThreads);
  launch(mask_kernel<T>, masks_, kPatchThreads, 0, device_.stream);
  launch(pack_kernel<T, E>, packings_, threads, 0, device_.stream);
  launch(denormalise_kernel<T>, projections_, threads, 0, device_.stream);
  launch(unpack_kernel<T>, unpackings_, kPatchThreads, 0, device_.stream);
  masks_.clear();
  packings_.clear();
  projections_.clear();
  unpackings_.clear();
}

template class Patching<float>;
template class Patching<double>;
template class Patching<float, BFloat16>;
template class Patching<float, Half>;

std::tuple<Tensor, Tensor> patches(const Tensor& features, int64_t k, const std::optional<Tensor>& mask,
                                   std::optional<double> threshold, bool resize, double eps) {
  check_patches(features, k, mask, threshold, resize, eps);
  const OnDevice device(features);
  return with_compute_type(features, [&](auto type) {
    using T = decltype(type);
    Patching<T> patching(device);
    const Cut<T> cut = patching.cut(Shape::of(features), k, {mask, threshold}, resize, features);
    const int64_t count = features.size(0) * k * k;
    const Tensor rows = new_compact(features, {count, cut.length()}, kScalarType<T>);
    const Tensor norms = new_compact(features, {count}, kScalarType<T>);
    patching.pack(cut, features, data_of<T>(rows), data_of<T>(norms), nullptr, eps);
    patching.run();
    return std::make_tuple(rows, norms);
  });
}

Tensor patches_backward(const Tensor& grad_rows, const Tensor& rows, const Tensor& norms,
                        const std::vector<int64_t>& numbers, int64_t k, const std::optional<Tensor>& mask,
                        std::optional<double> threshold, bool resize) {
  check_patches_backward(grad_rows, rows, norms, numbers, k, mask, threshold, resize);
  const OnDevice device(rows);
  const Shape shape = Shape::read(rows.size(0) / (k * k), numbers.data());
  const Tensor grad = compact(grad_rows), vectors = compact(rows), lengths = compact(norms);
  return with_compute_type(rows, [&](auto type) {
    using T = decltype(type);
    Patching<T> patching(device);
    const Cut<T> cut = patching.cut(shape, k, {mask, threshold}, resize, rows);
    const Tensor patches = new_compact(rows, {rows.size(0), rows.size(1)});
    patching.denormalise(cut, shape.images, grad.const_data_ptr<T>(), vectors.const_data_ptr<T>(),
                         lengths.const_data_ptr<T>(), data_of<T>(patches));
    const Tensor maps = patching.unpack(cut, shape, data_of<T>(patches), nullptr, rows);
    patching.run();
    return maps;
  });
}

}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(KDKERNELS_NAMESPACE, KDKERNELS_DEVICE, m) {
  m.impl("patches", TORCH_BOX(&kdkernels::patches));
  m.impl("patches_backward", TORCH_BOX(&kdkernels::patches_backward));
}
