// Mean-square errors of many pairs of maps, sample by sample. The larger map of a pair is averaged down to the smaller as it is
// read. A sample's pairs with one teacher layer follow each other, so that the teacher's maps are read from memory once.
#include <algorithm>
#include <vector>

#include "elements.h"
#include "lanes.h"
#include "operators.h"
#include "parallel.h"
#include "tensors.h"
#include "workspace.h"

namespace kdkernels {
namespace {

constexpr int64_t kBlock = 1 << 15;  // elements of a map that are converted or averaged at a time
constexpr int64_t kGrain = 1 << 15;  // elements worth waking another thread for

struct Span {
  int64_t begin, end;
  int64_t length() const { return end - begin; }
};

// What adaptive pooling of `length` positions to `size` averages into position i.
Span window(int64_t i, int64_t length, int64_t size) {
  return {i * length / size, ((i + 1) * length + size - 1) / size};
}

// Height and width in which a pair of maps is compared, and whether channels vary faster than positions in the rows of numbers
// that are compared.
struct Grid {
  int64_t channels, height, width;
  bool channels_last;

  int64_t area() const { return height * width; }
};

// Sums of `factor` neighbours.
template <int factor, typename T>
void add_neighbours(const T* in, int64_t count, T scale, T* out) {
  for (int64_t k = 0; k < count; ++k) {
    T sum = in[factor * k];
    for (int u = 1; u < factor; ++u) sum += in[factor * k + u];
    out[k] = scale * sum;
  }
}

// One of a pair's two batches of maps, or its gradient, with numbers of type T or converted to them.
template <typename T>
class Maps {
 public:
  Maps(const Tensor& tensor, const Grid& grid)
      : grid_(grid),
        type_(tensor.scalar_type()),
        data_(static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()))),
        height_(tensor.size(2)),
        width_(tensor.size(3)),
        sample_(tensor.stride(0)),
        channel_(tensor.stride(1)),
        line_(tensor.stride(2)),
        pixel_(tensor.stride(3)) {
    const auto lies = [](int64_t size, int64_t stride, int64_t expected) { return size == 1 || stride == expected; };
    const int64_t channels = grid.channels;
    const bool dense =
        grid.channels_last
            ? lies(channels, channel_, 1) && lies(width_, pixel_, channels) && lies(height_, line_, channels * width_)
            : lies(width_, pixel_, 1) && lies(height_, line_, width_) && lies(channels, channel_, height_ * width_);
    in_place_ = dense && type_ == kScalarType<T>;
  }

  bool pooled() const { return height_ != grid_.height || width_ != grid_.width; }
  int64_t area() const { return height_ * width_; }

  // A sample's `channels` from `first` on, averaged down to the grid and in its order: where they lie, or in scratch.
  const T* read(int64_t sample, int64_t first, int64_t channels, T* scratch) const {
    if (T* values = lies_at(sample, first, channels); values && !pooled()) return values;
    with_element_type(type_, [&](auto element) {
      using E = decltype(element);
      const E* source = reinterpret_cast<const E*>(data_) + sample * sample_ + first * channel_;
      grid_.channels_last ? average_pixels(source, channels, scratch) : average_planes(source, channels, scratch);
    });
    return scratch;
  }

  // Write the gradient of these maps, from that of what `read` gave.
  void write(int64_t sample, int64_t first, int64_t channels, const T* gradient, T* scratch) const {
    T* out = lies_at(sample, first, channels);
    T* whole = out ? out : scratch;
    if (pooled()) {
      grid_.channels_last ? spread_pixels(gradient, channels, whole) : spread_planes(gradient, channels, whole);
      gradient = whole;
    }
    if (out) return;
    with_element_type(type_, [&](auto element) {
      using E = decltype(element);
      E* place = reinterpret_cast<E*>(data_) + sample * sample_ + first * channel_;
      const int64_t rows = grid_.channels_last ? area() : 1,
                    length = grid_.channels_last ? channels : channels * area();
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < length; ++k) place[r * grid_.channels + k] = static_cast<E>(gradient[r * length + k]);
    });
  }

  // Where these channels lie as one run of numbers in the grid's order, at the maps' own size; null if they do not.
  T* lies_at(int64_t sample, int64_t first, int64_t channels) const {
    if (!in_place_ || (grid_.channels_last && channels != grid_.channels)) return nullptr;
    return reinterpret_cast<T*>(data_) + sample * sample_ + first * channel_;
  }

 private:
  template <typename E>
  void average_planes(const E* source, int64_t channels, T* out) const {
    const int64_t height = grid_.height, width = grid_.width;
    const bool even = width_ % width == 0 && height_ % height == 0;
    T* lines = workspace<T, Scratch::row>(height * width_);
    for (int64_t c = 0; c < channels; ++c, source += channel_, out += grid_.area()) {
      for (int64_t y = 0; y < height; ++y) {
        const auto [top, bottom] = window(y, height_, height);
        T* line = lines + y * width_;
        for (int64_t row = top; row < bottom; ++row) add_line(source + row * line_, line, row == top);
      }
      const T scale = even ? T(1) / T((height_ / height) * (width_ / width)) : T(0);
      if (even && width_ == width)
        add_neighbours<1>(lines, grid_.area(), scale, out);
      else if (even && width_ == 2 * width)
        add_neighbours<2>(lines, grid_.area(), scale, out);
      else if (even && width_ == 4 * width)
        add_neighbours<4>(lines, grid_.area(), scale, out);
      else if (even && width_ == 8 * width)
        add_neighbours<8>(lines, grid_.area(), scale, out);
      else
        average_lines(lines, out);
    }
  }

  // Call f with the width, as a constant for those that are common.
  template <typename F>
  void with_width(const F& f) const {
    switch (width_) {
      case 4:
        return f(std::integral_constant<int64_t, 4>());
      case 8:
        return f(std::integral_constant<int64_t, 8>());
      case 16:
        return f(std::integral_constant<int64_t, 16>());
      case 32:
        return f(std::integral_constant<int64_t, 32>());
      default:
        return f(width_);
    }
  }

  template <typename E>
  void add_line(const E* source, T* line, bool first) const {
    if (pixel_ != 1) {
      for (int64_t x = 0; x < width_; ++x) line[x] = (first ? T(0) : line[x]) + static_cast<T>(source[x * pixel_]);
      return;
    }
    with_width([&](auto width) {
      if (first)
        for (int64_t x = 0; x < width; ++x) line[x] = static_cast<T>(source[x]);
      else
        for (int64_t x = 0; x < width; ++x) line[x] += static_cast<T>(source[x]);
    });
  }

  void average_lines(const T* lines, T* out) const {
    for (int64_t y = 0; y < grid_.height; ++y)
      for (int64_t x = 0; x < grid_.width; ++x) {
        const Span across = window(x, width_, grid_.width);
        T sum = 0;
        for (int64_t k = across.begin; k < across.end; ++k) sum += lines[y * width_ + k];
        out[y * grid_.width + x] = sum / T(window(y, height_, grid_.height).length() * across.length());
      }
  }

  template <typename E>
  void average_pixels(const E* source, int64_t channels, T* out) const {
    const auto add = [&](const E* pixel, T* sums, auto step, bool first) {
      if (first)
        for (int64_t c = 0; c < channels; ++c) sums[c] = static_cast<T>(pixel[c * step]);
      else
        for (int64_t c = 0; c < channels; ++c) sums[c] += static_cast<T>(pixel[c * step]);
    };
    for_each_window([&](Span down, Span across, int64_t, int64_t) {
      for (int64_t y = down.begin; y < down.end; ++y)
        for (int64_t x = across.begin; x < across.end; ++x) {
          const E* pixel = source + y * line_ + x * pixel_;
          const bool first = y == down.begin && x == across.begin;
          channel_ == 1 ? add(pixel, out, std::integral_constant<int64_t, 1>(), first)
                        : add(pixel, out, channel_, first);
        }
      if (const int64_t count = down.length() * across.length(); count > 1)
        for (int64_t c = 0; c < channels; ++c) out[c] /= T(count);
      out += channels;
    });
  }

  // Every pixel of a window gets its share, windows that do not overlap. `factor` pixels across make one.
  template <int factor>
  void spread_evenly(const T* gradient, int64_t channels, T* out) const {
    const int64_t down = height_ / grid_.height, lines = channels * grid_.height;
    const T share = T(1) / T(down * factor);
    for (int64_t l = 0; l < lines; ++l, gradient += grid_.width, out += down * width_) {
      for (int64_t x = 0; x < grid_.width; ++x)
        for (int u = 0; u < factor; ++u) out[factor * x + u] = share * gradient[x];
      with_width([&](auto width) {
        for (int64_t row = 1; row < down; ++row)
          for (int64_t x = 0; x < width; ++x) out[row * width_ + x] = out[x];
      });
    }
  }

  // Windows may overlap: what an earlier one has reached is added to. `begun_y` and `begun_x` are where those ended.
  void spread_planes(const T* gradient, int64_t channels, T* out) const {
    if (height_ % grid_.height == 0) {
      if (width_ == grid_.width) return spread_evenly<1>(gradient, channels, out);
      if (width_ == 2 * grid_.width) return spread_evenly<2>(gradient, channels, out);
      if (width_ == 4 * grid_.width) return spread_evenly<4>(gradient, channels, out);
      if (width_ == 8 * grid_.width) return spread_evenly<8>(gradient, channels, out);
    }
    T* line = workspace<T, Scratch::row>(width_);
    for (int64_t c = 0; c < channels; ++c, out += area())
      for (int64_t y = 0, begun = 0; y < grid_.height; ++y) {
        const Span down = window(y, height_, grid_.height);
        for (int64_t x = 0, reached = 0; x < grid_.width; ++x) {
          const Span across = window(x, width_, grid_.width);
          const T share = *gradient++ / T(down.length() * across.length());
          for (int64_t k = across.begin; k < across.end; ++k) line[k] = k < reached ? line[k] + share : share;
          reached = across.end;
        }
        for (int64_t row = down.begin; row < down.end; ++row) {
          T* place = out + row * width_;
          if (row < begun)
            for (int64_t x = 0; x < width_; ++x) place[x] += line[x];
          else
            std::copy_n(line, width_, place);
        }
        begun = down.end;
      }
  }

  void spread_pixels(const T* gradient, int64_t channels, T* out) const {
    for_each_window([&](Span down, Span across, int64_t begun_y, int64_t begun_x) {
      const T share = T(1) / T(down.length() * across.length());
      for (int64_t y = down.begin; y < down.end; ++y)
        for (int64_t x = across.begin; x < across.end; ++x) {
          T* place = out + (y * width_ + x) * channels;
          if (y < begun_y || x < begun_x)
            for (int64_t c = 0; c < channels; ++c) place[c] += share * gradient[c];
          else
            for (int64_t c = 0; c < channels; ++c) place[c] = share * gradient[c];
        }
      gradient += channels;
    });
  }

  template <typename F>
  void for_each_window(const F& f) const {
    for (int64_t y = 0, begun_y = 0; y < grid_.height; ++y) {
      const Span down = window(y, height_, grid_.height);
      for (int64_t x = 0, begun_x = 0; x < grid_.width; ++x) {
        const Span across = window(x, width_, grid_.width);
        f(down, across, begun_y, begun_x);
        begun_x = across.end;
      }
      begun_y = down.end;
    }
  }

  Grid grid_;
  ScalarType type_;
  char* data_;
  int64_t height_, width_;
  int64_t sample_, channel_, line_, pixel_;
  bool in_place_;
};

template <typename T>
double squared_distance(const T* a, const T* b, int64_t count) {
  constexpr int64_t lanes = Vec<T>::size, run = 256 * lanes;
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += run) {
    const int64_t end = std::min(count, begin + run);
    typename Vec<T>::type sums[4] = {};
    int64_t k = begin;
    for (; k + 4 * lanes <= end; k += 4 * lanes)
      for (int64_t u = 0; u < 4; ++u) {
        const auto difference = load<T>(a + k + u * lanes) - load<T>(b + k + u * lanes);
        sums[u] += difference * difference;
      }
    for_vectors<T>(k, end, [&](int64_t j, int64_t n) {
      const auto difference = load_first<T>(a + j, n, T(0)) - load_first<T>(b + j, n, T(0));
      sums[0] += difference * difference;
    });
    total += reduce<T>((sums[0] + sums[1]) + (sums[2] + sums[3]), [](auto x, auto y) { return x + y; });
  }
  return total;
}

// One student layer's projection and one teacher layer.
template <typename T>
class Pair {
 public:
  Pair(const Tensor& projected, const Tensor& target)
      : grid_(grid_of(projected, target)), projected_(projected, grid_), target_(target, grid_) {
    const bool whole = projected_.lies_at(0, 0, grid_.channels) && target_.lies_at(0, 0, grid_.channels) &&
                       !projected_.pooled() && !target_.pooled();
    const int64_t largest = std::max(projected_.area(), target_.area());
    block_ = whole ? grid_.channels : std::clamp<int64_t>(kBlock / largest, 1, grid_.channels);
  }

  static Grid grid_of(const Tensor& projected, const Tensor& target) {
    const int64_t channels = projected.size(1), pixels = projected.size(2) * projected.size(3);
    return {channels, std::min(projected.size(2), target.size(2)), std::min(projected.size(3), target.size(3)),
            projected.stride(1) == 1 && channels > 1 && pixels > 1};
  }

  const Grid& grid() const { return grid_; }
  int64_t elements() const { return grid_.channels * (projected_.area() + target_.area()); }

  double error(int64_t sample) const {
    double sum = 0;
    blocks(sample, [&](int64_t, int64_t channels, const T* projected, const T* target) {
      sum += squared_distance(projected, target, channels * grid_.area());
    });
    return sum / (grid_.channels * grid_.area());
  }

  // Write `slope` times the gradient of the sample's error to those that are there.
  void gradients(int64_t sample, double slope, const Maps<T>* of_projected, const Maps<T>* of_target) const {
    const T factor = T(2 * slope / (grid_.channels * grid_.area()));
    blocks(sample, [&](int64_t first, int64_t channels, const T* projected, const T* target) {
      gradient(of_projected, sample, first, channels, factor, projected, target);
      gradient(of_target, sample, first, channels, -factor, projected, target);
    });
  }

 private:
  template <typename F>
  void blocks(int64_t sample, const F& f) const {
    const int64_t size = block_ * grid_.area();
    T* own = workspace<T, Scratch::rows_x>(size);
    T* other = workspace<T, Scratch::rows_y>(size);
    for (int64_t first = 0; first < grid_.channels; first += block_) {
      const int64_t channels = std::min(block_, grid_.channels - first);
      f(first, channels, projected_.read(sample, first, channels, own), target_.read(sample, first, channels, other));
    }
  }

  void gradient(const Maps<T>* out, int64_t sample, int64_t first, int64_t channels, T factor, const T* projected,
                const T* target) const {
    if (!out) return;
    const int64_t count = channels * grid_.area();
    T* place = out->pooled() ? nullptr : out->lies_at(sample, first, channels);
    T* differences = place ? place : workspace<T, Scratch::image>(count);
    for (int64_t k = 0; k < count; ++k) differences[k] = factor * (projected[k] - target[k]);
    if (!place)
      out->write(sample, first, channels, differences, workspace<T, Scratch::patches>(channels * out->area()));
  }

  Grid grid_;
  Maps<T> projected_, target_;
  int64_t block_;
};

template <typename T>
class Problem {
 public:
  Problem(const std::vector<Tensor>& projected, const std::vector<Tensor>& targets, const Tensor& weights)
      : batch_(weights.size(0)), teachers_(weights.size(2)), weights_(batch_ * projected.size()) {
    const int64_t count = projected.size();
    for (int64_t p = 0; p < count; ++p) pairs_.emplace_back(projected[p], targets[p]);
    const Elements elements(weights);
    for (int64_t s = 0; s < batch_; ++s) elements.read<T>(s, 0, count, weights_.data() + s * count);
  }

  double weight(int64_t entry) const { return weights_[entry]; }
  const Grid& grid(int64_t pair) const { return pairs_[pair].grid(); }

  // Call f(pair, sample, entry): the pair itself, and the number of its error among those of all samples and pairs.
  template <typename F>
  void for_each(const F& f) const {
    const int64_t count = pairs_.size(), tasks = batch_ * teachers_;
    int64_t elements = 0;
    for (const Pair<T>& pair : pairs_) elements += pair.elements();
    parallel_blocks(tasks, 1, 1 + kGrain * teachers_ / elements, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t sample = task / teachers_;
        for (int64_t p = task % teachers_; p < count; p += teachers_) f(pairs_[p], p, sample, sample * count + p);
      }
    });
  }

 private:
  int64_t batch_, teachers_;
  std::vector<T> weights_;
  std::vector<Pair<T>> pairs_;
};

template <typename T>
std::tuple<Tensor, Tensor> run(const std::vector<Tensor>& projected, const std::vector<Tensor>& targets,
                               const Tensor& weights, double scale) {
  const Problem<T> problem(projected, targets, weights);
  const Tensor errors = new_compact(weights, {weights.size(0), weights.size(1), weights.size(2)}, kScalarType<T>);
  T* out = errors.mutable_data_ptr<T>();
  std::vector<double> terms(weights.numel());
  problem.for_each([&](const Pair<T>& pair, int64_t, int64_t sample, int64_t entry) {
    const double error = scale * pair.error(sample);
    terms[entry] = problem.weight(entry) * error;
    out[entry] = T(error);
  });
  double loss = 0;
  for (const double term : terms) loss += term;
  return {new_scalar<T>(weights, loss), errors};
}

// A gradient of maps like `maps`, in the order of the grid.
Tensor new_gradient(const Tensor& maps, bool channels_last, bool wanted) {
  using torch::headeronly::MemoryFormat;
  if (!wanted) return new_compact(maps, {0});
  return torch::stable::empty(maps.sizes(), maps.scalar_type(), std::nullopt, maps.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

template <typename T>
std::vector<Tensor> run_backward(double slope, const std::vector<Tensor>& projected, const std::vector<Tensor>& targets,
                                 const Tensor& weights, const std::vector<int64_t>& wanted) {
  const Problem<T> problem(projected, targets, weights);
  const int64_t count = projected.size();
  std::vector<Tensor> grads;
  std::vector<Maps<T>> maps;
  for (int64_t g = 0; g < 2 * count; ++g) {
    const Grid& grid = problem.grid(g % count);
    const Tensor& own = g < count ? projected[g] : targets[g - count];
    grads.push_back(new_gradient(own, grid.channels_last, wanted[g]));
    maps.emplace_back(wanted[g] ? grads[g] : own, grid);
  }
  problem.for_each([&](const Pair<T>& pair, int64_t p, int64_t sample, int64_t entry) {
    pair.gradients(sample, slope * problem.weight(entry), wanted[p] ? &maps[p] : nullptr,
                   wanted[count + p] ? &maps[count + p] : nullptr);
  });
  return grads;
}

}  // namespace

std::tuple<Tensor, Tensor> feature_mse(const std::vector<Tensor>& projected, const std::vector<Tensor>& targets,
                                       const Tensor& weights, double scale) {
  return any_double(projected) || any_double(targets) ? run<double>(projected, targets, weights, scale)
                                                      : run<float>(projected, targets, weights, scale);
}

std::vector<Tensor> feature_mse_backward(const Tensor& grad_loss, const std::vector<Tensor>& projected,
                                         const std::vector<Tensor>& targets, const Tensor& weights, double scale,
                                         const std::vector<int64_t>& wanted) {
  return with_compute_type(grad_loss, [&](auto type) {
    using T = decltype(type);
    return run_backward<T>(scale * *grad_loss.const_data_ptr<T>(), projected, targets, weights, wanted);
  });
}

}  // namespace kdkernels
