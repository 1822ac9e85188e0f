// Mean squared errors of many pairs of maps, one sample at a time. The larger map of a pair is averaged down to the
// smaller while it is read. Windows along an axis overlap if they do not divide it.
#pragma once

#include "divisor.cuh"
#include "elements.cuh"
#include "group.cuh"
#include "tuning.cuh"

namespace kdkernels {

// Half-open ranges.
struct Window {
  int begin, end;

  __device__ int length() const { return end - begin; }

  // The positions of `length` that are averaged into position i of `size`.
  static __device__ Window of(int i, int length, int size) {
    if (length % size == 0) return {i * (length / size), (i + 1) * (length / size)};
    return {int(int64_t(i) * length / size), int((int64_t(i + 1) * length + size - 1) / size)};
  }

  // The positions of `size` whose windows contain position i of `length`. `each` is the smallest length of a window.
  static __device__ Window around(int i, int length, int size, const Divisor& each) {
    if (each.value * size == length) return {each.quotient(i), each.quotient(i) + 1};
    return {int(int64_t(i) * size / length), int((int64_t(i + 1) * size - 1) / length) + 1};
  }
};

// The index order of the numbers of a sample: [channel][line][column], or [line][column][channel] for channels_last.
struct Grid {
  int channels, height, width;
  bool channels_last;
  Divisor inner, by_width;  // inner: channels or pixels, whichever index changes fastest

  struct Place {
    int channel, line, column;
  };

  static Grid of(int channels, int height, int width, bool channels_last) {
    return {channels,          height, width, channels_last, Divisor::of(channels_last ? channels : height * width),
            Divisor::of(width)};
  }
  __host__ __device__ int size() const { return channels * height * width; }
  __device__ Place place(int number) const {
    const int outside = inner.quotient(number), inside = number - outside * inner.value;
    const int pixel = channels_last ? outside : inside;
    return {channels_last ? inside : outside, by_width.quotient(pixel), by_width.remainder(pixel)};
  }
  __device__ int number(const Place& p) const {
    const int pixel = p.line * width + p.column;
    return channels_last ? pixel * channels + p.channel : p.channel * height * width + pixel;
  }
};

// A batch of maps in any strides.
struct Maps {
  const void* data;
  Element type;
  int height, width;
  int64_t sample, channel, line, pixel;

  // Return the average at one place of a grid.
  template <typename T>
  __device__ T averaged(int64_t index, const Grid& grid, const Grid::Place& place) const {
    const Window down = Window::of(place.line, height, grid.height),
                 across = Window::of(place.column, width, grid.width);
    const int64_t first = index * sample + place.channel * channel;
    T sum = 0;
    for (int y = down.begin; y < down.end; ++y)
      for (int x = across.begin; x < across.end; ++x) sum += read<T>(data, type, first + y * line + x * pixel);
    return sum / T(down.length() * across.length());
  }
};

// A projection of a student layer, and a teacher layer.
struct LayerPair {
  Maps projected, target;
  Grid grid;   // the grid in which they are compared
  bool alike;  // both have the memory order of the grid, and four numbers can be read at a time
  int number;  // the index among all pairs
};

// Calls f(number, differences) for the numbers of a sample from begin to end, four or one at a time.
template <typename T, typename F>
__device__ void for_each_difference(const LayerPair& p, int64_t sample, int begin, int end, const F& f) {
  if (p.alike) {
    for (int i = begin + 4 * int(threadIdx.x); i < end; i += 4 * kMapThreads) {
      T differences[4], others[4];
      read_together(p.projected.data, p.projected.type, sample * p.projected.sample + i, differences);
      read_together(p.target.data, p.target.type, sample * p.target.sample + i, others);
      for (int j = 0; j < 4; ++j) differences[j] -= others[j];
      f(i, differences);
    }
    return;
  }
  for (int i = begin + int(threadIdx.x); i < end; i += kMapThreads) {
    const Grid::Place place = p.grid.place(i);
    const T difference[1] = {p.projected.averaged<T>(sample, p.grid, place) -
                             p.target.averaged<T>(sample, p.grid, place)};
    f(i, difference);
  }
}

// One block per sample and part of its numbers. The parts of a sample and a pair are contiguous.
template <typename T>
__global__ void __launch_bounds__(kMapThreads, 4)
    error_kernel(const __grid_constant__ Group<LayerPair> group, int pairs, int parts, double* partials) {
  const int index = group.index();
  const LayerPair& p = group.problems[index];
  const int sample = group.block(index) / parts, part = group.block(index) % parts;
  const int size = p.grid.size(), length = ((size + parts - 1) / parts + 3) / 4 * 4;
  const int begin = int(min(int64_t(part) * length, int64_t(size))), end = min(length, size - begin) + begin;
  double sum = 0;
  for_each_difference<T>(p, sample, begin, end, [&](int, const auto& differences) {
    T squares = 0;
    for (const T difference : differences) squares += difference * difference;
    sum += double(squares);
  });
  sum = block_reduce(sum, Sum<double>());
  if (threadIdx.x == 0) partials[(int64_t(sample) * pairs + p.number) * parts + part] = sum / size;
}

// [samples][student layers][teacher layers], any strides. Entries are numbered in this order.
struct Weights {
  const void* data;
  Element type;
  int students, teachers;
  int64_t sample, student, teacher;

  template <typename T>
  __device__ T at(int64_t entry) const {
    const int64_t pair = entry % (students * teachers);
    return read<T>(data, type,
                   entry / (students * teachers) * sample + pair / teachers * student + pair % teachers * teacher);
  }
};

// One block. It sums the parts of every error, and computes the weighted sum of all errors.
template <typename T>
__global__ void __launch_bounds__(kLossThreads)
    loss_kernel(const double* partials, int64_t entries, int parts, double scale, Weights weights, T* errors, T* loss) {
  double sum = 0;
  for (int64_t entry = threadIdx.x; entry < entries; entry += kLossThreads) {
    double error = 0;
    for (int part = 0; part < parts; ++part) error += partials[entry * parts + part];
    error *= scale;
    errors[entry] = T(error);
    sum += double(weights.at<T>(entry)) * error;
  }
  sum = block_reduce(sum, Sum<double>());
  if (threadIdx.x == 0) *loss = T(sum);
}

// The factors of the loss's gradient to the maps.
struct Slope {
  const void* grad_loss;
  Element type;
  double scale;
  Weights weights;
};

// The destination of the gradient to a pair's differences. For a map that is not averaged, it is the gradient of the
// map. For a map that is averaged, it is a buffer of the grid's size, which a later kernel spreads. Null if it is not
// wanted.
template <typename T>
struct PairGradients {
  LayerPair pair;
  void *of_projected, *of_target;
  T* of_grid;
};

template <typename T, int N>
__device__ void write_scaled(void* out, Element type, int64_t offset, T scale, const T (&values)[N]) {
  if (!out) return;
  T scaled[N];
  for (int i = 0; i < N; ++i) scaled[i] = scale * values[i];
  write_together(out, type, offset, scaled);
}

// One block per sample and 4096 numbers of the grid.
template <typename T>
__global__ void __launch_bounds__(kMapThreads, 4)
    pair_gradients_kernel(const __grid_constant__ Group<PairGradients<T>> group, Slope slope, int pairs) {
  const int index = group.index();
  const PairGradients<T>& p = group.problems[index];
  const int size = p.pair.grid.size(), parts = (size + kNumbers - 1) / kNumbers;
  const int64_t sample = group.block(index) / parts, first = sample * size;
  const int begin = group.block(index) % parts * kNumbers;
  const double weight = slope.weights.at<T>(sample * pairs + p.pair.number);
  const T factor = T(2 * slope.scale * read<double>(slope.grad_loss, slope.type, 0) * weight / size);
  for_each_difference<T>(p.pair, sample, begin, begin + min(kNumbers, size - begin), [&](int i, const auto& values) {
    write_scaled(p.of_projected, p.pair.projected.type, first + i, factor, values);
    write_scaled(p.of_target, p.pair.target.type, first + i, -factor, values);
    write_scaled(p.of_grid, kElement<T>, first + i, factor, values);
  });
}

// The gradient to maps that are averaged.
template <typename T>
struct Spreading {
  const T* of_grid;
  Grid grid, maps;
  Divisor lines, columns;  // smallest number of map lines and columns per grid line and column
  T sign;
  void* out;
  Element type;
};

// One block per sample and 4096 numbers of the maps. Each number sums its shares in the windows that contain it.
template <typename T>
__global__ void __launch_bounds__(kMapThreads, 1) spread_kernel(const __grid_constant__ Group<Spreading<T>> group) {
  const int index = group.index();
  const Spreading<T>& p = group.problems[index];
  const int size = p.maps.size(), parts = (size + kNumbers - 1) / kNumbers;
  const int64_t sample = group.block(index) / parts;
  const int begin = group.block(index) % parts * kNumbers, end = begin + min(kNumbers, size - begin);
  const T* const of_grid = p.of_grid + sample * p.grid.size();
  const auto share = [&](const Grid::Place& place) {
    const Window down = Window::of(place.line, p.maps.height, p.grid.height),
                 across = Window::of(place.column, p.maps.width, p.grid.width);
    return of_grid[p.grid.number(place)] / T(down.length() * across.length());
  };
  for (int number = begin + int(threadIdx.x); number < end; number += kMapThreads) {
    const Grid::Place place = p.maps.place(number);
    const Window down = Window::around(place.line, p.maps.height, p.grid.height, p.lines),
                 across = Window::around(place.column, p.maps.width, p.grid.width, p.columns);
    T sum = 0;
    for (int y = down.begin; y < down.end; ++y)
      for (int x = across.begin; x < across.end; ++x) sum += share({place.channel, y, x});
    write(p.out, p.type, sample * size + number, p.sign * sum);
  }
}

}  // namespace kdkernels
