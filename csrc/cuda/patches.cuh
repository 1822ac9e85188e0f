// From feature maps to unit patch vectors and back. The patch grid is the map after four steps: mask, crop, stretch to
// the original size, resize to a multiple of k. This is linear in the map, and separable in height and width.
#pragma once

#include "divisor.cuh"
#include "elements.cuh"
#include "group.cuh"
#include "tuning.cuh"

namespace kdkernels {

// Half-open bounds of a crop.
struct Box {
  int top, bottom, left, right;
};

// How the maps of one network in one stage are cut.
template <typename T>
struct Cut {
  int channels, height, width, k;
  Divisor patch_height, patch_width;
  bool pixel_major;  // a patch vector is [pixel][channel], not [channel][pixel]
  bool resized;
  Divisor inner;     // pixels of a patch, or channels if it is pixel major
  const T* mask;     // [images][height][width]; null without a mask
  const Box* boxes;  // one per image; null without a crop

  __host__ __device__ int positions() const { return k * k; }
  __host__ __device__ int patch_area() const { return patch_height.value * patch_width.value; }
  __host__ __device__ int length() const { return channels * patch_area(); }
  __host__ __device__ int area() const { return height * width; }
  __host__ __device__ bool resampled() const { return resized || boxes; }
};

// Bilinear interpolation along one axis: output o is (1 - weight) * input[low] + weight * input[high].
template <typename T>
struct Tap {
  int low, high;
  T weight;
};

// Stretch [begin, end) over `size` outputs, with PyTorch's convention for align_corners=False.
template <typename T>
__device__ Tap<T> stretch(int begin, int end, int size, int o) {
  const int length = end - begin;
  // (o + 1/2) * length / size - 1/2 in integers. An output at the position of an input must get nothing from the next
  // input, which may be larger by any factor.
  const int64_t source = Largest<int64_t>()(0, (2 * int64_t(o) + 1) * length - size), whole = 2 * int64_t(size);
  const int low = int(source / whole);
  return {begin + low, begin + min(low + 1, length - 1), T(source % whole) / T(whole)};
}

// The outputs of `stretch` that may read the inputs first to last.
__device__ inline void widen(int begin, int end, int size, int& first, int& last) {
  const double scale = double(size) / (end - begin);
  first = max(0, int(floor((first - begin - 0.5) * scale - 0.5)) - 1);
  last = min(size - 1, int(ceil((last - begin + 1.5) * scale - 0.5)) + 1);
}

// One axis from the map to the patch grid: the crop [begin, end) is stretched to `size`, and the result to `padded`.
template <typename T>
struct Axis {
  int begin, end, size, padded;
  bool cropped;

  // Calls f(pixel, weight) for the pixels of the map that pixel `o` of the grid reads.
  template <typename F>
  __device__ void taps(int o, const F& f) const {
    const auto crop = [&](int middle, T weight) {
      if (!cropped) return f(middle, weight);
      const Tap<T> tap = stretch<T>(begin, end, size, middle);
      f(tap.low, weight * (1 - tap.weight));
      f(tap.high, weight * tap.weight);
    };
    if (size == padded) return crop(o, T(1));
    const Tap<T> tap = stretch<T>(0, size, padded, o);
    crop(tap.low, 1 - tap.weight);
    crop(tap.high, tap.weight);
  }

  // Calls f(o, weight) for the pixels of the grid that read a pixel of the map.
  template <typename F>
  __device__ void uses(int pixel, const F& f) const {
    int first = pixel, last = pixel;
    if (cropped) widen(begin, end, size, first, last);
    if (size != padded) widen(0, size, padded, first, last);
    for (int o = first; o <= last; ++o) {
      T weight = 0;
      taps(o, [&](int tapped, T its_weight) { weight += tapped == pixel ? its_weight : T(0); });
      if (weight != 0) f(o, weight);
    }
  }
};

template <typename T>
__device__ Axis<T> vertical(const Cut<T>& cut, int64_t image) {
  if (!cut.boxes) return {0, cut.height, cut.height, cut.patch_height.value * cut.k, false};
  return {cut.boxes[image].top, cut.boxes[image].bottom, cut.height, cut.patch_height.value * cut.k, true};
}

template <typename T>
__device__ Axis<T> horizontal(const Cut<T>& cut, int64_t image) {
  if (!cut.boxes) return {0, cut.width, cut.width, cut.patch_width.value * cut.k, false};
  return {cut.boxes[image].left, cut.boxes[image].right, cut.width, cut.patch_width.value * cut.k, true};
}

// A mask of any size and strides, resampled to the size of one network's maps.
template <typename T>
struct Masking {
  const void* mask;
  Element type;
  int64_t image_stride, row_stride, column_stride;
  int mask_height, mask_width, height, width;
  double threshold;
  T* resampled;  // images x height x width
  Box* boxes;    // null without a threshold
};

// One block per image. It computes the mask at the size of the maps, and the tight bounds of mask > threshold, scaled
// to this size and widened to whole pixels. If nothing exceeds the threshold, they are the whole map. NaN counts as
// exceeding it.
template <typename T>
__global__ void __launch_bounds__(kPatchThreads, 1) mask_kernel(const __grid_constant__ Group<Masking<T>> group) {
  const int index = group.index();
  const Masking<T>& p = group.problems[index];
  const int64_t image = group.block(index);
  const auto value = [&](int y, int x) {
    return read<T>(p.mask, p.type, image * p.image_stride + y * p.row_stride + x * p.column_stride);
  };
  const bool same = p.height == p.mask_height && p.width == p.mask_width;
  for (int i = threadIdx.x; i < p.height * p.width; i += kPatchThreads) {
    const int y = i / p.width, x = i % p.width;
    T result;
    if (same) {
      result = value(y, x);
    } else {
      const Tap<T> v = stretch<T>(0, p.mask_height, p.height, y), h = stretch<T>(0, p.mask_width, p.width, x);
      result = (1 - v.weight) * ((1 - h.weight) * value(v.low, h.low) + h.weight * value(v.low, h.high)) +
               v.weight * ((1 - h.weight) * value(v.high, h.low) + h.weight * value(v.high, h.high));
    }
    p.resampled[image * p.height * p.width + i] = result;
  }
  if (!p.boxes) return;

  // A mask is compared in its own precision.
  const bool in_double = p.type == Element::float64;
  Box box{p.mask_height, 0, p.mask_width, 0};
  for (int i = threadIdx.x; i < p.mask_height * p.mask_width; i += kPatchThreads) {
    const int y = i / p.mask_width, x = i % p.mask_width;
    const int64_t offset = image * p.image_stride + y * p.row_stride + x * p.column_stride;
    const bool below = in_double ? read<double>(p.mask, p.type, offset) <= p.threshold
                                 : read<float>(p.mask, p.type, offset) <= float(p.threshold);
    if (!below) box = {min(box.top, y), max(box.bottom, y + 1), min(box.left, x), max(box.right, x + 1)};
  }
  const auto smallest = [](int a, int b) { return a < b ? a : b; };
  box.top = block_reduce(box.top, smallest);
  box.bottom = block_reduce(box.bottom, Largest<int>());
  box.left = block_reduce(box.left, smallest);
  box.right = block_reduce(box.right, Largest<int>());
  if (threadIdx.x > 0) return;
  if (box.bottom == 0) box = {0, p.mask_height, 0, p.mask_width};
  const auto down = [](int64_t bound, int size, int from) { return int(bound * size / from); };
  const auto up = [](int64_t bound, int size, int from) { return int((bound * size + from - 1) / from); };
  p.boxes[image] = {down(box.top, p.height, p.mask_height), up(box.bottom, p.height, p.mask_height),
                    down(box.left, p.width, p.mask_width), up(box.right, p.width, p.mask_width)};
}

// The rows of one network. Half-precision rows, with numbers E, keep their digits. They are not divided by their norms,
// but scaled to a common size by powers of two. Their factors turn them into unit vectors. `norms` then undo the
// powers.
template <typename T, typename E = T>
struct Packing {
  Cut<T> cut;
  const void* maps;
  Element type;
  int64_t strides[4];
  double eps;
  E* rows;
  T *norms, *factors;  // factors: null unless rows are half precision
};

// One block per patch. It writes the unit vector and the norm. A patch of norm <= eps becomes zeros with norm 0.
template <typename T, typename E>
__global__ void __launch_bounds__(kPatchThreads, 1) pack_kernel(const __grid_constant__ Group<Packing<T, E>> group) {
  const int index = group.index();
  const Packing<T, E>& p = group.problems[index];
  const Cut<T>& cut = p.cut;
  const int64_t row = group.block(index), image = group.block(index) / cut.positions();
  const int position = group.block(index) % cut.positions();
  const int top = position / cut.k * cut.patch_height.value, left = position % cut.k * cut.patch_width.value;
  const int length = cut.length();
  const Axis<T> down = vertical(cut, image), across = horizontal(cut, image);
  E* out = p.rows + row * length;

  const auto pixel = [&](int c, int y, int x) {
    const int64_t offset = image * p.strides[0] + c * p.strides[1] + y * p.strides[2] + x * p.strides[3];
    const T value = read<T>(p.maps, p.type, offset);
    return cut.mask ? value * cut.mask[image * cut.area() + y * cut.width + x] : value;
  };
  double squares = 0;
  for (int j = threadIdx.x; j < length; j += blockDim.x) {
    const int outside = cut.inner.quotient(j), inside = j - outside * cut.inner.value;
    const int c = cut.pixel_major ? inside : outside, cell = cut.pixel_major ? outside : inside;
    const int line = cut.patch_width.quotient(cell), y = top + line, x = left + cell - line * cut.patch_width.value;
    T value = 0;
    if (cut.resampled())
      down.taps(y, [&](int v, T weight) {
        across.taps(x, [&](int h, T its_weight) { value += weight * its_weight * pixel(c, v, h); });
      });
    else
      value = pixel(c, y, x);
    out[j] = number<E>(value);
    squares += double(value) * double(value);  // the range of float64 holds the square of every float32
  }
  const double norm = sqrt(block_reduce(squares, Sum<double>()));
  // Outside of the usual range, the inverse is not a normal float32.
  const bool dead = norm <= p.eps, usual = norm > 1e-30 && norm < 1e30;
  if constexpr (kIsHalf<E>) {
    const double power = balance(norm);
    for (int j = threadIdx.x; j < length; j += blockDim.x)
      out[j] = number<E>(dead ? T(0) : T(number<double>(out[j]) * power));
    if (threadIdx.x > 0) return;
    p.norms[row] = dead ? T(0) : T(1 / power);
    p.factors[row] = dead ? T(0) : T(1 / (norm * power));
  } else {
    const T inverse = T(1 / norm);
    for (int j = threadIdx.x; j < length; j += blockDim.x)
      out[j] = dead ? T(0) : usual ? out[j] * inverse : T(double(out[j]) / norm);
    if (threadIdx.x == 0) p.norms[row] = dead ? T(0) : T(norm);
  }
}

template <typename T, typename E = T>
struct Projection {
  const T* grad;
  const E* rows;
  const T *norms, *factors;
  T* out;
  int length;
};

// One block, for one row: the gradient before the normalisation from the gradient after it, (g − x̂ ⟨g, x̂⟩) / ‖x‖. It
// may work in place.
template <typename T, typename E>
__device__ void denormalise(const Projection<T, E>& p, int64_t row) {
  const int64_t begin = row * p.length;
  const T norm = p.norms[row], factor = p.factors ? p.factors[row] : T(1);
  const auto unit = [&](int j) { return number<T>(p.rows[begin + j]) * factor; };
  double product = 0;
  for (int j = threadIdx.x; j < p.length; j += blockDim.x) product += double(p.grad[begin + j]) * double(unit(j));
  const T radial = T(block_reduce(product, Sum<double>()));
  for (int j = threadIdx.x; j < p.length; j += blockDim.x)
    p.out[begin + j] = norm == 0 ? T(0) : (p.grad[begin + j] - unit(j) * radial) / norm;
}

template <typename T>
__global__ void __launch_bounds__(kPatchThreads, 1)
    denormalise_kernel(const __grid_constant__ Group<Projection<T>> group) {
  const int index = group.index();
  denormalise<T, T>(group.problems[index], group.block(index));
}

template <typename T>
struct Unpacking {
  Cut<T> cut;
  bool channels_last;
  Divisor inner, width;  // pixels of a map, or channels for channels_last
  const T* grad;         // of the patches
  const void* scale;     // a number on the device, null for 1
  Element scale_type;
  T* maps;  // compact
};

// One block per image and kPixels pixels of its maps. It computes scale times their gradient.
template <typename T>
__global__ void __launch_bounds__(kPatchThreads, 1) unpack_kernel(const __grid_constant__ Group<Unpacking<T>> group) {
  const int index = group.index();
  const Unpacking<T>& p = group.problems[index];
  const Cut<T>& cut = p.cut;
  const int size = cut.channels * cut.area(), chunks = (size + kPixels - 1) / kPixels;
  const int64_t image = group.block(index) / chunks;
  const int begin = group.block(index) % chunks * kPixels, end = begin + min(kPixels, size - begin);
  const int length = cut.length();
  const T* const patches = p.grad + image * cut.positions() * length;
  const T* const mask = cut.mask ? cut.mask + image * cut.area() : nullptr;
  const T scale = p.scale ? read<T>(p.scale, p.scale_type, 0) : T(1);
  T* const maps = p.maps + image * size;

  for (int i = begin + int(threadIdx.x); i < end; i += kPatchThreads) {
    const int outside = p.inner.quotient(i), inside = i - outside * p.inner.value;
    const int c = p.channels_last ? inside : outside, pixel = p.channels_last ? outside : inside;
    const int y = p.width.quotient(pixel), x = pixel - y * cut.width;
    const auto of_grid = [&](int v, int h) {
      const int down = cut.patch_height.quotient(v), across = cut.patch_width.quotient(h);
      const int cell = (v - down * cut.patch_height.value) * cut.patch_width.value + h - across * cut.patch_width.value;
      const int component = cut.pixel_major ? cell * cut.channels + c : c * cut.patch_area() + cell;
      return patches[int64_t(down * cut.k + across) * length + component];
    };
    T result = 0;
    if (cut.resampled())
      vertical(cut, image).uses(y, [&](int v, T weight) {
        horizontal(cut, image).uses(x, [&](int h, T its_weight) { result += weight * its_weight * of_grid(v, h); });
      });
    else
      result = of_grid(y, x);
    maps[i] = scale * (mask ? result * mask[pixel] : result);
  }
}

}  // namespace kdkernels
