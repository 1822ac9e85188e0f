// Mean-square errors of many pairs of maps, sample by sample. The larger map of a pair is averaged down to the smaller as it is
// read, along each axis over windows that overlap where they do not divide it.
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

  // What position i of `size` is the average of, among `length`.
  static __device__ Window of(int i, int length, int size) {
    if (length % size == 0) return {i * (length / size), (i + 1) * (length / size)};
    return {int(int64_t(i) * length / size), int((int64_t(i + 1) * length + size - 1) / size)};
  }

  // The positions of `size` whose windows position i of `length` lies in. `each` is the least length of a window.
  static __device__ Window around(int i, int length, int size, const Divisor& each) {
    if (each.value * size == length) return {each.quotient(i), each.quotient(i) + 1};
    return {int(int64_t(i) * size / length), int((int64_t(i + 1) * size - 1) / length) + 1};
  }
};

// How the numbers of one sample are counted: by channel, line and column or, with the channels last, by line, column and channel.
struct Grid {
  int channels, height, width;
  bool channels_last;
  Divisor inner, by_width;  // inner: channels, or pixels, whichever are counted first

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

  // What averaging them down to a grid makes of one place.
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

// A projection of a student's layer, and a teacher's layer.
struct Pair {
  Maps projected, target;
  Grid grid;   // in which they are compared
  bool alike;  // both lie in memory as the grid counts, and can be read four numbers at a time
  int number;  // among all pairs
};

// Calls f(number, differences) for the numbers of a sample from begin to end, four or one at a time.
template <typename T, typename F>
__device__ void for_each_difference(const Pair& p, int64_t sample, int begin, int end, const F& f) {
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

// A block per sample and part of its numbers. Of every sample and pair there are so many parts, one after the other.
template <typename T>
__global__ void __launch_bounds__(kMapThreads, 4)
    error_kernel(const __grid_constant__ Group<Pair> group, int pairs, int parts, double* partials) {
  const int index = group.index();
  const Pair& p = group.problems[index];
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

// samples x student layers x teacher layers, in any strides; its entries are numbered in this order.
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

// One block: every entry's error from its parts, and the weighted sum of all.
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

// What the loss's slope in the maps is made of.
struct Slope {
  const void* grad_loss;
  Element type;
  double scale;
  Weights weights;
};

// Where the slope of a pair's differences goes: into the gradients of maps that are not averaged, and into the grid's numbers, in
// which it waits to be spread over those that are. Null where it is not wanted.
template <typename T>
struct PairGradients {
  Pair pair;
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

// A block per sample and 4096 numbers of the grid.
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

// The gradient of maps that are averaged.
template <typename T>
struct Spreading {
  const T* of_grid;
  Grid grid, maps;
  Divisor lines, columns;  // of the maps, to one of the grid at least
  T sign;
  void* out;
  Element type;
};

// A block per sample and 4096 numbers of the maps: each one's shares in the windows that it lies in.
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
