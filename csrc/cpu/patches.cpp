#include "patches.h"

#include <algorithm>
#include <cmath>

#include "../checks/patches.h"
#include "parallel.h"
#include "rows.h"
#include "workspace.h"

namespace kdkernels {
namespace {

// The number of elements that is worth another thread.
constexpr int64_t kGrain = 1 << 13;

// The maps of one image. Element (c, y, x) is at data[c * channel + y * line + x * pixel].
template <typename T>
struct Maps {
  T* data;
  int64_t channel, line, pixel;

  T* at(int64_t c, int64_t y, int64_t x) const { return data + c * channel + y * line + x * pixel; }
};

template <typename T>
Maps<T> image_of(const Tensor& features, T* data, int64_t i) {
  return {data + i * features.stride(0), features.stride(1), features.stride(2), features.stride(3)};
}

// Bilinear interpolation along one axis: output o is (1 - weight) * input[low] + weight * input[high].
template <typename T>
struct Tap {
  int64_t low, high;
  T weight;
};

// Stretch [begin, end) over `size` outputs, with PyTorch's convention for align_corners=False.
template <typename T>
std::vector<Tap<T>> stretch(int64_t begin, int64_t end, int64_t size) {
  std::vector<Tap<T>> taps(size);
  const int64_t length = end - begin;
  for (int64_t o = 0; o < size; ++o) {
    // (o + 1/2) * length / size - 1/2 in integers. An output at the position of an input must get nothing from the next input,
    // which may be larger by any factor.
    const int64_t source = std::max<int64_t>(0, (2 * o + 1) * length - size), low = source / (2 * size);
    taps[o] = {begin + low, begin + std::min(low + 1, length - 1), T(source % (2 * size)) / T(2 * size)};
  }
  return taps;
}

// A separable resampling of height x width maps in up to two steps: from the crop to the original size, then to multiples of k.
template <typename T>
struct Resampling {
  struct Step {
    int64_t height, width;  // of its output
    std::vector<Tap<T>> rows, columns;
  };
  std::vector<Step> steps;
};

// From height x width maps to `out`; both planes are compact.
template <typename T>
void resample(const typename Resampling<T>::Step& step, int64_t height, int64_t width, const T* in, T* scratch,
              T* out) {
  for (int64_t y = 0; y < height; ++y)
    for (int64_t x = 0; x < step.width; ++x) {
      const auto& [low, high, weight] = step.columns[x];
      scratch[y * step.width + x] = (1 - weight) * in[y * width + low] + weight * in[y * width + high];
    }
  for (int64_t y = 0; y < step.height; ++y) {
    const auto& [low, high, weight] = step.rows[y];
    const T *first = scratch + low * step.width, *second = scratch + high * step.width;
    for (int64_t x = 0; x < step.width; ++x) out[y * step.width + x] = (1 - weight) * first[x] + weight * second[x];
  }
}

// The transpose of `resample`: from the gradient of its output to the gradient of its input.
template <typename T>
void resample_transposed(const typename Resampling<T>::Step& step, int64_t height, int64_t width, const T* in,
                         T* scratch, T* out) {
  std::fill_n(scratch, height * step.width, T(0));
  for (int64_t y = 0; y < step.height; ++y) {
    const auto& [low, high, weight] = step.rows[y];
    T *first = scratch + low * step.width, *second = scratch + high * step.width;
    for (int64_t x = 0; x < step.width; ++x) first[x] += (1 - weight) * in[y * step.width + x];
    for (int64_t x = 0; x < step.width; ++x) second[x] += weight * in[y * step.width + x];
  }
  std::fill_n(out, height * width, T(0));
  for (int64_t y = 0; y < height; ++y)
    for (int64_t x = 0; x < step.width; ++x) {
      const auto& [low, high, weight] = step.columns[x];
      out[y * width + low] += (1 - weight) * scratch[y * step.width + x];
      out[y * width + high] += weight * scratch[y * step.width + x];
    }
}

struct Box {
  int64_t top, bottom, left, right;
};

// Return the tight bounds of mask > threshold, scaled to height x width and widened to whole pixels. If nothing exceeds the
// threshold, they are the whole map. NaN counts as exceeding it, so NaN is never cropped away.
template <typename C, typename M>
Box bounding_box(const Maps<M>& mask, int64_t mask_height, int64_t mask_width, C threshold, int64_t height,
                 int64_t width) {
  Box box{mask_height, 0, mask_width, 0};
  for (int64_t y = 0; y < mask_height; ++y)
    for (int64_t x = 0; x < mask_width; ++x) {
      if (C(*mask.at(0, y, x)) <= threshold) continue;
      box = {std::min(box.top, y), std::max(box.bottom, y + 1), std::min(box.left, x), std::max(box.right, x + 1)};
    }
  if (box.bottom == 0) box = {0, mask_height, 0, mask_width};
  const auto up = [](int64_t value, int64_t size, int64_t from) { return (value * size + from - 1) / from; };
  return {box.top * height / mask_height, up(box.bottom, height, mask_height), box.left * width / mask_width,
          up(box.right, width, mask_width)};
}

// The mask of image i at the size of the features, and the resampling of its masked maps.
template <typename T>
struct Lens {
  std::vector<T> mask;  // height x width; empty without one
  Resampling<T> resampling;

  Lens(const Partition& p, int64_t i) {
    if (p.mask) with_element_type(*p.mask, [&](auto type) { read_mask<decltype(type)>(p, i); });
    if (p.resampled()) {
      const int64_t height = p.patch_height * p.k, width = p.patch_width * p.k;
      resampling.steps.push_back({height, width, stretch<T>(0, p.height, height), stretch<T>(0, p.width, width)});
    }
  }

 private:
  template <typename M>
  void read_mask(const Partition& p, int64_t i) {
    const int64_t height = p.mask->size(1), width = p.mask->size(2);
    const Maps<const M> source{p.mask->const_data_ptr<M>() + i * p.mask->stride(0), 0, p.mask->stride(1),
                               p.mask->stride(2)};
    mask.resize(p.height * p.width);
    const auto rows = stretch<T>(0, height, p.height), columns = stretch<T>(0, width, p.width);
    for (int64_t y = 0; y < p.height; ++y)
      for (int64_t x = 0; x < p.width; ++x) {
        const auto& [top, bottom, v] = rows[y];
        const auto& [left, right, u] = columns[x];
        const auto value = [&](int64_t row, int64_t column) { return T(*source.at(0, row, column)); };
        T& out = mask[y * p.width + x];
        if (height == p.height && width == p.width)
          out = value(y, x);
        else
          out = (1 - v) * ((1 - u) * value(top, left) + u * value(top, right)) +
                v * ((1 - u) * value(bottom, left) + u * value(bottom, right));
      }
    if (!p.threshold) return;
    using Compare = std::conditional_t<std::is_same_v<M, double>, double, float>;  // precision of the mask
    const Box box = bounding_box(source, height, width, Compare(*p.threshold), p.height, p.width);
    resampling.steps.push_back(
        {p.height, p.width, stretch<T>(box.top, box.bottom, p.height), stretch<T>(box.left, box.right, p.width)});
  }
};

// Copy between the maps of one image and its k x k patch vectors, which are `stride` elements apart: f(map element, patch
// element). The innermost loop runs over elements that are neighbours in both.
template <typename M, typename T, typename F>
void for_each_element(const Partition& p, const Maps<M>& maps, T* patches, int64_t stride, const F& f) {
  const int64_t length = p.length(), ph = p.patch_height, pw = p.patch_width;
  if (p.k == 1 && maps.pixel == 1 && maps.line == pw && maps.channel == ph * pw) {  // the layouts are equal
    for (int64_t j = 0; j < length; ++j) f(maps.data[j], patches[j]);
    return;
  }
  if (p.pixel_major) {
    for (int64_t y = 0; y < ph * p.k; ++y)
      for (int64_t x = 0; x < pw * p.k; ++x) {
        M* map = maps.at(0, y, x);
        T* patch = patches + (y / ph * p.k + x / pw) * stride + (y % ph * pw + x % pw) * p.channels;
        for (int64_t c = 0; c < p.channels; ++c) f(map[c], patch[c]);
      }
    return;
  }
  const auto line = [&](M* map, T* patch, auto width, auto pixel) {
    for (int64_t px = 0; px < p.k; ++px, map += width * pixel, patch += stride)
      for (int64_t x = 0; x < width; ++x) f(map[x * pixel], patch[x]);
  };
  const auto lines = [&](auto width, auto pixel) {
    for (int64_t c = 0; c < p.channels; ++c)
      for (int64_t y = 0; y < ph * p.k; ++y)
        line(maps.at(c, y, 0), patches + y / ph * p.k * stride + (c * ph + y % ph) * pw, width, pixel);
  };
  // Common widths are compile-time constants, so that the compiler moves whole vectors.
  using std::integral_constant;
  if (maps.pixel != 1) return lines(pw, maps.pixel);
  const integral_constant<int64_t, 1> compact;
  switch (pw) {
    case 1:
      return lines(integral_constant<int64_t, 1>(), compact);
    case 2:
      return lines(integral_constant<int64_t, 2>(), compact);
    case 4:
      return lines(integral_constant<int64_t, 4>(), compact);
    case 8:
      return lines(integral_constant<int64_t, 8>(), compact);
    default:
      return lines(pw, compact);
  }
}

}  // namespace

Shape Shape::of(const Tensor& features) {
  Shape shape{features.size(0), features.size(1), features.size(2), features.size(3), false};
  shape.channels_last = features.stride(1) == 1 && shape.channels > 1 && shape.height * shape.width > 1;
  return shape;
}

Partition::Partition(const Shape& shape, int64_t k, const std::optional<Tensor>& mask, std::optional<double> threshold,
                     bool resize)
    : Shape(shape),
      k(k),
      patch_height(resize ? (height + k - 1) / k : height / k),
      patch_width(resize ? (width + k - 1) / k : width / k),
      pixel_major(false),
      mask(mask),
      threshold(threshold) {
  // Masked or resampled maps are copied into a compact image, one channel at a time.
  pixel_major = channels_last && !mask && !resampled();
}

template <typename T>
void Partition::pack(const Tensor& features, T* rows, int64_t line, T* norms, double eps) const {
  const int64_t stored = positions() * length(), area = height * width;
  const int64_t padded = patch_height * k * patch_width * k, plane = std::max(area, padded);
  with_element_type(features, [&](auto type) {
    using E = decltype(type);
    parallel_blocks(images, 1, 1 + kGrain / stored, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Maps<const E> maps = image_of(features, features.const_data_ptr<E>(), i);
        T* patches = rows + i * positions() * line;
        if (!mask && !resampled()) {
          for_each_element(*this, maps, patches, line, [](const E& map, T& patch) { patch = T(map); });
        } else {
          const Lens<T> lens(*this, i);
          T* image = workspace<T, Scratch::image>(channels * padded + 3 * plane);
          for (int64_t c = 0; c < channels; ++c) {
            T *a = image + channels * padded, *b = a + plane, *scratch = b + plane;
            for (int64_t y = 0; y < height; ++y)
              for (int64_t x = 0; x < width; ++x) a[y * width + x] = T(*maps.at(c, y, x));
            if (!lens.mask.empty())
              for (int64_t j = 0; j < area; ++j) a[j] *= lens.mask[j];
            for (const auto& step : lens.resampling.steps) {
              resample<T>(step, height, width, a, scratch, b);
              std::swap(a, b);
            }
            std::copy_n(a, padded, image + c * padded);
          }
          const Maps<const T> whole{image, padded, patch_width * k, 1};
          for_each_element(*this, whole, patches, line, [](const T& map, T& patch) { patch = map; });
        }
        for (int64_t p = 0; p < positions(); ++p)
          norms[i * positions() + p] = normalise(patches + p * line, length(), eps);
      }
    });
  });
}

template <typename T>
void Partition::denormalise(const T* grad, const T* rows, int64_t line, const T* norms, T* out) const {
  const int64_t size = length();
  parallel_blocks(this->rows(), 1, 1 + kGrain / size, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      denormalise_row(grad + r * size, rows + r * line, norms[r], size, out + r * size);
    }
  });
}

template <typename T>
Tensor Partition::unpack(const T* grad, T scale, const Tensor& like) const {
  using torch::headeronly::MemoryFormat;
  const int64_t stored = positions() * length(), area = height * width;
  const int64_t padded = patch_height * k * patch_width * k, plane = std::max(area, padded);
  const Tensor result =
      torch::stable::empty({images, channels, height, width}, kScalarType<T>, std::nullopt, like.device(), std::nullopt,
                           channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  T* data = result.mutable_data_ptr<T>();
  parallel_blocks(images, 1, 1 + kGrain / stored, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Maps<T> maps = image_of(result, data, i);
      const T* patches = grad + i * stored;
      if (!mask && !resampled()) {
        for_each_element(*this, maps, patches, length(), [&](T& map, const T& patch) { map = scale * patch; });
        continue;
      }
      const Lens<T> lens(*this, i);
      T* image = workspace<T, Scratch::image>(channels * padded + 3 * plane);
      const Maps<T> whole{image, padded, patch_width * k, 1};
      for_each_element(*this, whole, patches, length(), [&](T& map, const T& patch) { map = scale * patch; });
      for (int64_t c = 0; c < channels; ++c) {
        T *a = image + c * padded, *b = image + channels * padded, *other = b + plane, *scratch = other + plane;
        for (auto step = lens.resampling.steps.rbegin(); step != lens.resampling.steps.rend(); ++step) {
          resample_transposed<T>(*step, height, width, a, scratch, b);
          a = b;
          std::swap(b, other);
        }
        for (int64_t y = 0; y < height; ++y)
          for (int64_t x = 0; x < width; ++x) {
            const int64_t j = y * width + x;
            *maps.at(c, y, x) = lens.mask.empty() ? a[j] : a[j] * lens.mask[j];
          }
      }
    }
  });
  return result;
}

template void Partition::pack<float>(const Tensor&, float*, int64_t, float*, double) const;
template void Partition::pack<double>(const Tensor&, double*, int64_t, double*, double) const;
template void Partition::denormalise<float>(const float*, const float*, int64_t, const float*, float*) const;
template void Partition::denormalise<double>(const double*, const double*, int64_t, const double*, double*) const;
template Tensor Partition::unpack<float>(const float*, float, const Tensor&) const;
template Tensor Partition::unpack<double>(const double*, double, const Tensor&) const;

std::tuple<Tensor, Tensor> patches(const Tensor& features, int64_t k, const std::optional<Tensor>& mask,
                                   std::optional<double> threshold, bool resize, double eps) {
  check_patches(features, k, mask, threshold, resize, eps);
  const Partition partition(Shape::of(features), k, mask, threshold, resize);
  return with_compute_type(features, [&](auto type) {
    using T = decltype(type);
    const Tensor rows = new_compact(features, {partition.rows(), partition.length()}, kScalarType<T>);
    const Tensor norms = new_compact(features, {partition.rows()}, kScalarType<T>);
    partition.pack(features, rows.mutable_data_ptr<T>(), partition.length(), norms.mutable_data_ptr<T>(), eps);
    return std::make_tuple(rows, norms);
  });
}

Tensor patches_backward(const Tensor& grad_rows, const Tensor& rows, const Tensor& norms,
                        const std::vector<int64_t>& shape, int64_t k, const std::optional<Tensor>& mask,
                        std::optional<double> threshold, bool resize) {
  check_patches_backward(grad_rows, rows, norms, shape, k, mask, threshold, resize);
  const Partition partition(Shape::read(rows.size(0) / (k * k), shape.data()), k, mask, threshold, resize);
  const Tensor grad = compact(grad_rows), vectors = compact(rows), lengths = compact(norms);
  return with_compute_type(rows, [&](auto type) {
    using T = decltype(type);
    T* patches = workspace<T, Scratch::patches>(partition.rows() * partition.length());
    partition.denormalise(grad.const_data_ptr<T>(), vectors.const_data_ptr<T>(), partition.length(),
                          lengths.const_data_ptr<T>(), patches);
    return partition.unpack(patches, T(1), rows);
  });
}

}  // namespace kdkernels

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  // Unit patch vectors and their norms. The norm is 0 for a patch of norm <= eps. A shape of features has four numbers:
  // channels, height, width, and whether channels are neighbours in memory.
  m.def(
      "patches(Tensor features, int k, Tensor? mask, float? threshold, bool resize, float eps)"
      " -> (Tensor rows, Tensor norms)");
  m.def(
      "patches_backward(Tensor grad_rows, Tensor rows, Tensor norms, int[] shape, int k, Tensor? mask,"
      " float? threshold, bool resize) -> Tensor grad_features");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("patches", TORCH_BOX(&kdkernels::patches));
  m.impl("patches_backward", TORCH_BOX(&kdkernels::patches_backward));
}
