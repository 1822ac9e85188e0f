// Mean squared errors of many pairs of maps, one sample at a time. The larger map of a pair is averaged down to the smaller
// while it is read. The pairs of a sample with one teacher layer follow each other. So the teacher's map is read from memory
// once, and averaged further for each smaller size.
#include <algorithm>
#include <optional>
#include <vector>

#include "../checks/feature_mse.h"
#include "elements.h"
#include "lanes.h"
#include "parallel.h"
#include "tensors.h"
#include "workspace.h"

namespace kdkernels {
namespace {

constexpr int64_t kBlock = 1 << 12;  // numbers of a map that are processed at a time
constexpr int64_t kGrain = 1 << 15;  // numbers that are worth another thread

struct Span {
  int64_t begin, end;
  int64_t length() const { return end - begin; }
};

// The positions that adaptive pooling from `length` to `size` averages into position i.
Span window(int64_t i, int64_t length, int64_t size) {
  return {i * length / size, ((i + 1) * length + size - 1) / size};
}

// The positions among `size` into which position i of `length` is averaged.
Span windows_of(int64_t i, int64_t length, int64_t size) { return window(i, size, length); }

// One vector of sums of every `count` neighbouring runs.
template <typename T, int64_t count, int64_t run, int64_t... lane>
typename Vec<T>::type sums_of_runs(const T* in, std::integer_sequence<int64_t, lane...> lanes) {
  if constexpr (count == 1) {
    return load<T>(in);
  } else {
    const auto a = sums_of_runs<T, count / 2, run>(in, lanes);
    const auto b = sums_of_runs<T, count / 2, run>(in + count / 2 * Vec<T>::size, lanes);
    return __builtin_shufflevector(a, b, (lane / run * 2 * run + lane % run)...) +
           __builtin_shufflevector(a, b, (lane / run * 2 * run + run + lane % run)...);
  }
}

// Store each run of a vector `count` times.
template <typename T, int64_t count, int64_t run, int64_t... lane>
void store_repeated(typename Vec<T>::type a, T* out, std::integer_sequence<int64_t, lane...> lanes) {
  if constexpr (count == 1) {
    store<T>(out, a);
  } else {
    constexpr int64_t half = Vec<T>::size / 2;
    const auto first = __builtin_shufflevector(a, a, (lane / run / 2 * run + lane % run)...);
    const auto second = __builtin_shufflevector(a, a, (half + lane / run / 2 * run + lane % run)...);
    store_repeated<T, count / 2, run>(first, out, lanes);
    store_repeated<T, count / 2, run>(second, out + count * half, lanes);
  }
}

// Call f with the value as a compile-time constant if it is one of the given values.
template <int64_t... constant, typename F>
bool with_one_of(int64_t value, const F& f) {
  return ((value == constant && (f(std::integral_constant<int64_t, constant>()), true)) || ...);
}

// Call f with count and run as compile-time constants if they are common and a vector has several runs.
template <typename T, typename F>
bool with_short_runs(int64_t count, int64_t run, const F& f) {
  constexpr int64_t most = Vec<T>::size / 2;
  return with_one_of<1, std::min<int64_t>(2, most), std::min<int64_t>(4, most), most>(
      run, [&](auto run) { return with_one_of<2, 4, 8>(count, [&](auto count) { f(count, run); }); });
}

// out[g][r] = scale * the sum of in[g][k][r] over k < count; r < run. `out` may be `in`.
template <typename T>
void add_runs(const T* in, int64_t groups, int64_t count, int64_t run, T scale, T* out) {
  constexpr int64_t lanes = Vec<T>::size;
  int64_t done = 0;  // groups
  with_short_runs<T>(count, run, [&](auto count, auto run) {
    for (; (done + lanes / run) <= groups; done += lanes / run)
      store<T>(out + done * run, scale * sums_of_runs<T, count, run>(in + done * count * run,
                                                                     std::make_integer_sequence<int64_t, lanes>()));
  });
  for (int64_t g = done; g < groups; ++g)
    for_vectors<T>(0, run, [&](int64_t r, int64_t n) {
      const T* first = in + g * count * run + r;
      auto sum = load_first<T>(first, n, T(0));
      for (int64_t k = 1; k < count; ++k) sum += load_first<T>(first + k * run, n, T(0));
      store_first<T>(out + g * run + r, scale * sum, n);
    });
}

// out[g][k][r] = in[g][r] for k < count; r < run.
template <typename T>
void repeat_runs(const T* in, int64_t groups, int64_t count, int64_t run, T* out) {
  constexpr int64_t lanes = Vec<T>::size;
  int64_t done = 0;  // groups
  with_short_runs<T>(count, run, [&](auto count, auto run) {
    for (; (done + lanes / run) <= groups; done += lanes / run)
      store_repeated<T, count, run>(load<T>(in + done * run), out + done * count * run,
                                    std::make_integer_sequence<int64_t, lanes>());
  });
  for (int64_t g = done; g < groups; ++g)
    for_vectors<T>(0, run, [&](int64_t r, int64_t n) {
      const auto value = load_first<T>(in + g * run + r, n, T(0));
      for (int64_t k = 0; k < count; ++k) store_first<T>(out + (g * count + k) * run + r, value, n);
    });
}

// The layout of a sample: [planes][lines][pixels][depth].
struct Order {
  int64_t planes, depth;

  static Order of(const Tensor& maps) {
    const int64_t channels = maps.size(1), pixels = maps.size(2) * maps.size(3);
    const bool channels_last = maps.stride(1) == 1 && channels > 1 && pixels > 1;
    return channels_last ? Order{1, channels} : Order{channels, 1};
  }

  bool channels_last() const { return depth > 1; }
  bool operator==(const Order& other) const { return planes == other.planes && depth == other.depth; }
};

struct Size {
  int64_t height, width;

  int64_t area() const { return height * width; }
  bool operator==(const Size& other) const { return height == other.height && width == other.width; }
  bool divides(const Size& larger) const { return larger.height % height == 0 && larger.width % width == 0; }
};

// Averages maps down to a smaller size.
template <typename T>
class Pooling {
 public:
  Pooling(int64_t depth, Size from, Size to) : depth_(depth), from_(from), to_(to), even_(to.divides(from)) {}

  bool needed() const { return !(from_ == to_); }
  bool even() const { return even_; }

  // The end in the larger map of the smaller map's first lines, or of its first planes if windows overlap.
  int64_t offset(int64_t lines) const { return lines * from_.height / to_.height * from_.width * depth_; }

  // `out` may be `in` if windows do not overlap.
  void average(const T* in, int64_t lines, T* out) const {
    even_ ? average_evenly(in, lines, out) : average_planes(in, lines / to_.height, out);
  }

  // Compute the gradient of the larger map from `share()` times the gradient of the smaller map.
  void spread(const T* gradient, int64_t lines, T* out) const {
    even_ ? spread_evenly(gradient, lines, out) : spread_planes(gradient, lines / to_.height, out);
  }

  T share() const { return even_ ? T(1) / T(down() * across()) : T(1); }

 private:
  // Pixels that are averaged into one, if windows do not overlap.
  int64_t down() const { return from_.height / to_.height; }
  int64_t across() const { return from_.width / to_.width; }

  int64_t line() const { return to_.width * depth_; }
  int64_t wide() const { return from_.width * depth_; }

  void average_evenly(const T* in, int64_t lines, T* out) const {
    T* sums = across() > 1 ? workspace<T, Scratch::row>(lines * wide()) : out;
    add_runs(in, lines, down(), wide(), share(), sums);
    if (across() > 1) add_runs(sums, lines * to_.width, across(), depth_, T(1), out);
  }

  void spread_evenly(const T* gradient, int64_t lines, T* out) const {
    if (across() > 1) {
      T* repeated = workspace<T, Scratch::row>(lines * wide());
      repeat_runs(gradient, lines * to_.width, across(), depth_, repeated);
      gradient = repeated;
    }
    repeat_runs(gradient, lines, down(), wide(), out);
  }

  void average_planes(const T* in, int64_t planes, T* out) const {
    T* sums = workspace<T, Scratch::row>(wide());
    for (int64_t p = 0; p < planes; ++p, in += from_.height * wide())
      for (int64_t y = 0; y < to_.height; ++y, out += line()) {
        const Span down = window(y, from_.height, to_.height);
        add_runs(in + down.begin * wide(), 1, down.length(), wide(), T(1), sums);
        for (int64_t x = 0; x < to_.width; ++x) {
          const Span across = window(x, from_.width, to_.width);
          const T share = T(1) / T(down.length() * across.length());
          add_runs(sums + across.begin * depth_, 1, across.length(), depth_, share, out + x * depth_);
        }
      }
  }

  // Every line and every pixel sums the windows that contain it.
  void spread_planes(const T* gradient, int64_t planes, T* out) const {
    T* shares = workspace<T, Scratch::strip>(line());
    T* widened = workspace<T, Scratch::row>(to_.height * wide());
    for (int64_t p = 0; p < planes; ++p) {
      for (int64_t y = 0; y < to_.height; ++y, gradient += line()) {
        const int64_t height = window(y, from_.height, to_.height).length();
        for (int64_t x = 0; x < to_.width; ++x)
          for (int64_t d = x * depth_; d < (x + 1) * depth_; ++d)
            shares[d] = gradient[d] / T(height * window(x, from_.width, to_.width).length());
        for (int64_t x = 0; x < from_.width; ++x) {
          const Span holding = windows_of(x, from_.width, to_.width);
          add_runs(shares + holding.begin * depth_, 1, holding.length(), depth_, T(1),
                   widened + y * wide() + x * depth_);
        }
      }
      for (int64_t y = 0; y < from_.height; ++y, out += wide()) {
        const Span holding = windows_of(y, from_.height, to_.height);
        add_runs(widened + holding.begin * wide(), 1, holding.length(), wide(), T(1), out);
      }
    }
  }

  int64_t depth_;
  Size from_, to_;
  bool even_;
};

// One of the two batches of maps of a pair, or its gradient, as numbers of type T or converted to them. Lines have the size in
// which the pair is compared.
template <typename T>
class Maps {
 public:
  Maps(const Tensor& maps, const Order& order, Size size)
      : elements_(maps, order.channels_last() ? std::vector<int64_t>{2, 3, 1} : std::vector<int64_t>{1, 2, 3}),
        pooling_(order.depth, {maps.size(2), maps.size(3)}, size) {
    if (const auto rows = elements_.template evenly<T>(); rows && rows->col == 1) in_place_ = rows;
  }

  const Pooling<T>& pooling() const { return pooling_; }

  // Return `lines` of a sample from `first` on: in place, or in scratch memory.
  const T* read(int64_t sample, int64_t first, int64_t lines, T* scratch) const {
    const int64_t begin = pooling_.offset(first), count = pooling_.offset(first + lines) - begin;
    const T* source = place(sample, first);
    if (!source) {
      T* copy = pooling_.needed() ? workspace<T, Scratch::image>(count) : scratch;
      elements_.template read<T>(sample, begin, count, copy);
      source = copy;
    }
    if (!pooling_.needed()) return source;
    pooling_.average(source, lines, scratch);
    return scratch;
  }

  // Write the gradient of these maps from `pooling().share()` times the gradient of what `read` returns.
  void write(int64_t sample, int64_t first, int64_t lines, const T* gradient) const {
    const int64_t begin = pooling_.offset(first), count = pooling_.offset(first + lines) - begin;
    T* out = place(sample, first);
    if (pooling_.needed()) {
      T* whole = out ? out : workspace<T, Scratch::patches>(count);
      pooling_.spread(gradient, lines, whole);
      gradient = whole;
    }
    if (!out) elements_.template write<T>(sample, begin, count, gradient);
  }

  // Return the begin of these lines if all numbers of a sample are contiguous, otherwise null.
  T* place(int64_t sample, int64_t first) const {
    return in_place_ ? const_cast<T*>(in_place_->at(sample, pooling_.offset(first))) : nullptr;
  }

 private:
  Elements elements_;
  Pooling<T> pooling_;
  std::optional<View<T>> in_place_;
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

// The projection of one student layer, and one teacher layer.
template <typename T>
class LayerPair {
 public:
  LayerPair(const Tensor& projected, const Tensor& target)
      : order_(Order::of(projected)),
        size_{std::min(projected.size(2), target.size(2)), std::min(projected.size(3), target.size(3))},
        projected_(projected, order_, size_),
        target_(target, order_, size_),
        lines_(order_.planes * size_.height),
        line_(size_.width * order_.depth),
        elements_((projected.numel() + target.numel()) / projected.size(0)) {
    const int64_t group = projected_.pooling().even() && target_.pooling().even() ? 1 : size_.height;
    const int64_t longest = std::max(projected_.pooling().offset(lines_), target_.pooling().offset(lines_)) / lines_;
    block_ = std::min(lines_, round_up(std::max<int64_t>(1, kBlock / longest), group));
  }

  const Order& order() const { return order_; }
  int64_t elements() const { return elements_; }

  // A gradient of the projection or the target.
  Maps<T> gradient(const Tensor& maps) const { return {maps, order_, size_}; }

  // Return the sample's target in the size of the pair. If `before` is not null, it is the result for the pair `last`, which
  // has the same target.
  const T* target(int64_t sample, const LayerPair* last, const T* before) const {
    if (before && last->size_ == size_) return before;
    T* scratch = workspace<T, Scratch::rows_y>(lines_ * line_);
    if (before && last->target_.pooling().even() && size_.divides(last->size_)) {
      const Pooling<T> further(order_.depth, last->size_, size_);
      blocks([&](int64_t first, int64_t lines) {
        further.average(before + further.offset(first), lines, scratch + first * line_);
      });
      return scratch;
    }
    if (!target_.pooling().needed())
      if (const T* target = target_.place(sample, 0)) return target;
    blocks([&](int64_t first, int64_t lines) { target_.read(sample, first, lines, scratch + first * line_); });
    return scratch;
  }

  double error(int64_t sample, const T* target) const {
    double sum = 0;
    blocks([&](int64_t first, int64_t lines) {
      sum += squared_distance(projected(sample, first, lines), target + first * line_, lines * line_);
    });
    return sum / (lines_ * line_);
  }

  // Write `slope` times the gradient of the sample's error to the gradients that exist.
  void gradients(int64_t sample, double slope, const T* target, const Maps<T>* of_projected,
                 const Maps<T>* of_target) const {
    const T factor = T(2 * slope / (lines_ * line_));
    blocks([&](int64_t first, int64_t lines) {
      const T* own = projected(sample, first, lines);
      write_gradient(of_projected, sample, first, lines, factor, own, target + first * line_);
      write_gradient(of_target, sample, first, lines, -factor, own, target + first * line_);
    });
  }

 private:
  template <typename F>
  void blocks(const F& f) const {
    for (int64_t first = 0; first < lines_; first += block_) f(first, std::min(block_, lines_ - first));
  }

  const T* projected(int64_t sample, int64_t first, int64_t lines) const {
    return projected_.read(sample, first, lines, workspace<T, Scratch::rows_x>(block_ * line_));
  }

  void write_gradient(const Maps<T>* out, int64_t sample, int64_t first, int64_t lines, T factor, const T* projected,
                      const T* target) const {
    if (!out) return;
    T* place = out->pooling().needed() ? nullptr : out->place(sample, first);
    T* differences = place ? place : workspace<T, Scratch::product>(block_ * line_);
    factor *= out->pooling().share();
    for (int64_t k = 0; k < lines * line_; ++k) differences[k] = factor * (projected[k] - target[k]);
    if (!place) out->write(sample, first, lines, differences);
  }

  Order order_;
  Size size_;
  Maps<T> projected_, target_;
  int64_t lines_, line_, elements_, block_;
};

bool same_maps(const Tensor& a, const Tensor& b) {
  if (a.const_data_ptr() != b.const_data_ptr() || a.scalar_type() != b.scalar_type()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d) || a.stride(d) != b.stride(d)) return false;
  return true;
}

template <typename T>
class LayerPairs {
 public:
  LayerPairs(const std::vector<Tensor>& projected, const std::vector<Tensor>& targets, const Tensor& weights)
      : batch_(weights.size(0)), teachers_(weights.size(2)), weights_(batch_ * projected.size()) {
    const int64_t count = projected.size();
    for (int64_t p = 0; p < count; ++p) pairs_.emplace_back(projected[p], targets[p]);
    const Elements elements(weights);
    for (int64_t s = 0; s < batch_; ++s) elements.read<T>(s, 0, count, weights_.data() + s * count);
    // Large maps come first, so that smaller maps can be computed from them.
    const auto size = [&](int64_t p) { return projected[p].numel(); };
    for (int64_t t = 0; t < teachers_; ++t) {
      std::vector<int64_t> column;
      for (int64_t p = t; p < count; p += teachers_) column.push_back(p);
      std::stable_sort(column.begin(), column.end(), [&](int64_t a, int64_t b) { return size(a) > size(b); });
      for (size_t k = 0; k < column.size(); ++k) {
        const int64_t p = column[k], last = k ? column[k - 1] : p;
        const bool again = k && same_maps(targets[p], targets[last]) && pairs_[p].order() == pairs_[last].order();
        steps_.push_back({p, again ? &pairs_[last] : nullptr});
      }
    }
  }

  double weight(int64_t entry) const { return weights_[entry]; }
  const LayerPair<T>& pair(int64_t p) const { return pairs_[p]; }

  // Call f(p, sample, entry, target) for all pairs p. `entry` is the index of the error among all samples and pairs. `target`
  // is the sample's target in the size of the pair.
  template <typename F>
  void for_each(const F& f) const {
    const int64_t count = pairs_.size(), students = count / teachers_, tasks = batch_ * teachers_;
    int64_t elements = 0;
    for (const LayerPair<T>& pair : pairs_) elements += pair.elements();
    parallel_blocks(tasks, 1, 1 + kGrain * teachers_ / elements, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t sample = task / teachers_;
        const T* target = nullptr;
        for (int64_t k = task % teachers_ * students; k < (task % teachers_ + 1) * students; ++k) {
          const auto [p, last] = steps_[k];
          target = pairs_[p].target(sample, last, last ? target : nullptr);
          f(p, sample, sample * count + p, target);
        }
      }
    });
  }

 private:
  // A pair, and the previous pair if it has the same target.
  struct Step {
    int64_t pair;
    const LayerPair<T>* last;
  };

  int64_t batch_, teachers_;
  std::vector<T> weights_;
  std::vector<LayerPair<T>> pairs_;
  std::vector<Step> steps_;  // by teacher
};

template <typename T>
std::tuple<Tensor, Tensor> run(const std::vector<Tensor>& projected, const std::vector<Tensor>& targets,
                               const Tensor& weights, double scale) {
  const LayerPairs<T> problem(projected, targets, weights);
  const Tensor errors = new_compact(weights, {weights.size(0), weights.size(1), weights.size(2)}, kScalarType<T>);
  T* out = errors.mutable_data_ptr<T>();
  std::vector<double> terms(weights.numel());
  problem.for_each([&](int64_t p, int64_t sample, int64_t entry, const T* target) {
    const double error = scale * problem.pair(p).error(sample, target);
    terms[entry] = problem.weight(entry) * error;
    out[entry] = T(error);
  });
  double loss = 0;
  for (const double term : terms) loss += term;
  return {new_scalar<T>(weights, loss), errors};
}

// A gradient of maps like `maps`, in the order of its pair.
Tensor new_gradient(const Tensor& maps, bool channels_last, bool wanted) {
  using torch::headeronly::MemoryFormat;
  if (!wanted) return new_compact(maps, {0});
  return torch::stable::empty(maps.sizes(), maps.scalar_type(), std::nullopt, maps.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

template <typename T>
std::vector<Tensor> run_backward(double slope, const std::vector<Tensor>& projected, const std::vector<Tensor>& targets,
                                 const Tensor& weights, const std::vector<int64_t>& wanted) {
  const LayerPairs<T> problem(projected, targets, weights);
  const int64_t count = projected.size();
  std::vector<Tensor> grads;
  std::vector<Maps<T>> maps;
  for (int64_t g = 0; g < 2 * count; ++g) {
    const LayerPair<T>& pair = problem.pair(g % count);
    const Tensor& own = g < count ? projected[g] : targets[g - count];
    grads.push_back(new_gradient(own, pair.order().channels_last(), wanted[g]));
    maps.push_back(pair.gradient(wanted[g] ? grads[g] : own));
  }
  problem.for_each([&](int64_t p, int64_t sample, int64_t entry, const T* target) {
    problem.pair(p).gradients(sample, slope * problem.weight(entry), target, wanted[p] ? &maps[p] : nullptr,
                              wanted[count + p] ? &maps[count + p] : nullptr);
  });
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
    using T = decltype(type);
    return run_backward<T>(scale * *grad_loss.const_data_ptr<T>(), projected, targets, weights, wanted);
  });
}

}  // namespace kdkernels

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  // scale * Σ weights ∘ errors, and scale * errors. Pairs of maps have the order of the weights' last two dimensions. wanted: a
  // flag for every projected map, then for every target. A gradient has the element type of its map.
  m.def(
      "feature_mse(Tensor[] projected, Tensor[] targets, Tensor weights, float scale) -> (Tensor loss, Tensor errors)");
  m.def(
      "feature_mse_backward(Tensor grad_loss, Tensor[] projected, Tensor[] targets, Tensor weights, float scale,"
      " int[] wanted) -> Tensor[] grads");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("feature_mse", TORCH_BOX(&kdkernels::feature_mse));
  m.impl("feature_mse_backward", TORCH_BOX(&kdkernels::feature_mse_backward));
}
