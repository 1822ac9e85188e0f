// Similarity matrices of many layers: the products of every pair of samples. The threads share all layers as one long sum.
#include <numeric>
#include <vector>

#include "../checks/gram.h"
#include "elements.h"
#include "gemm.h"
#include "tensors.h"

namespace kdkernels {
namespace {

constexpr int64_t kChunk = 512;  // features per sample that are converted at a time
constexpr int64_t kEverything = int64_t(1) << 62;

// One layer's features as a b x depth matrix. They are read in place if they have type T and a constant stride, and otherwise
// converted in chunks.
template <typename T>
class Layer {
 public:
  explicit Layer(const Tensor& features) : elements_(features), evenly_(elements_.template evenly<T>()) {}

  int64_t batch() const { return elements_.samples; }
  int64_t depth() const { return elements_.depth; }

  // Call f(first, end, matrix) for ranges that cover [begin, end), with a view of their columns.
  template <typename F>
  void columns(int64_t begin, int64_t end, const F& f) const {
    if (evenly_) {
      const auto [data, row, col] = *evenly_;
      return f(begin, end, View<T>{data + begin * col, row, col});
    }
    T* scratch = workspace<T, Scratch::rows_x>(batch() * kChunk);
    for (int64_t first = begin; first < end; first += kChunk) {
      const int64_t count = std::min(kChunk, end - first);
      for (int64_t i = 0; i < batch(); ++i) elements_.template read<T>(i, first, count, scratch + i * count);
      f(first, first + count, View<T>{scratch, count, 1});
    }
  }

 private:
  Elements elements_;
  std::optional<View<T>> evenly_;
};

template <typename T>
std::vector<Layer<T>> layers_of(const std::vector<Tensor>& features) {
  return {features.begin(), features.end()};
}

// The depths of all layers as one line, cut into one part per thread.
struct Shares {
  std::vector<int64_t> starts;  // the begin of each layer, and the end of the last
  Blocks parts;

  template <typename T>
  Shares(const std::vector<Layer<T>>& layers, int64_t batch)
      : starts(1), parts(total(layers), 64, 1 + (int64_t(1) << 18) / (batch * batch)) {
    for (const Layer<T>& layer : layers) starts.push_back(starts.back() + layer.depth());
  }

  // Call f(layer, begin, end) for the depths of each layer in [begin, end) of the line.
  template <typename F>
  void layers(int64_t begin, int64_t end, const F& f) const {
    for (int64_t l = layer_at(begin); begin < end; ++l) {
      const int64_t stop = std::min(end, starts[l + 1]);
      if (begin < stop) f(l, begin - starts[l], stop - starts[l]);
      begin = stop;
    }
  }

  int64_t layer_at(int64_t place) const {
    return std::upper_bound(starts.begin(), starts.end(), place) - starts.begin() - 1;
  }

 private:
  template <typename T>
  static int64_t total(const std::vector<Layer<T>>& layers) {
    int64_t sum = 0;
    for (const Layer<T>& layer : layers) sum += layer.depth();
    return sum;
  }
};

template <typename T>
Tensor run_gram(const std::vector<Tensor>& features) {
  const auto layers = layers_of<T>(features);
  const int64_t batch = layers[0].batch(), area = batch * batch;
  const Shares shares(layers, batch);
  const Tensor result = new_compact(features[0], {int64_t(layers.size()), batch, batch}, kScalarType<T>);
  T* matrices = result.mutable_data_ptr<T>();
  // A part that begins within a layer sums its share separately. The shares are added in order.
  const auto begins_within = [&](int64_t begin) { return shares.starts[shares.layer_at(begin)] != begin; };
  T* partial = workspace<T, Scratch::partial_sums>(shares.parts.count * area);
  shares.parts.parallel([&](int64_t part, int64_t begin, int64_t end) {
    shares.layers(begin, end, [&](int64_t l, int64_t from, int64_t to) {
      T* out = from == 0 ? matrices + l * area : partial + part * area;
      layers[l].columns(from, to, [&](int64_t first, int64_t last, View<T> rows) {
        gemm_detail::fastest_product<T>(batch, batch, last - first, rows, rows.transposed(), out, batch, T(1),
                                        first > from, 0);
      });
    });
  });
  for (int64_t part = 1; part < shares.parts.count; ++part) {
    const int64_t begin = part * shares.parts.length;
    T* out = matrices + shares.layer_at(begin) * area;
    if (begins_within(begin))
      for (int64_t i = 0; i < batch; ++i)
        for (int64_t j = i; j < batch; ++j) out[i * batch + j] += partial[part * area + i * batch + j];
  }
  for (T* matrix = matrices; matrix < matrices + layers.size() * area; matrix += area)
    for (int64_t i = 0; i < batch; ++i)
      for (int64_t j = 0; j < i; ++j) matrix[i * batch + j] = matrix[j * batch + i];
  return result;
}

// Compute (dA + dAᵀ) F, and store it in the features' type.
template <typename T>
std::vector<Tensor> run_backward(const Tensor& grad, const std::vector<Tensor>& features) {
  const auto layers = layers_of<T>(features);
  const int64_t batch = layers[0].batch(), area = batch * batch;
  Buffer<T> sums(layers.size() * area);
  const T* slopes = grad.const_data_ptr<T>();
  for (size_t l = 0; l < layers.size(); ++l)
    for (int64_t i = 0; i < batch; ++i)
      for (int64_t j = 0; j < batch; ++j)
        sums.data()[l * area + i * batch + j] = slopes[l * area + i * batch + j] + slopes[l * area + j * batch + i];
  std::vector<Tensor> grads;
  for (size_t l = 0; l < layers.size(); ++l) grads.push_back(new_compact(features[l], {batch, layers[l].depth()}));
  const Shares shares(layers, batch);
  shares.parts.parallel([&](int64_t, int64_t begin, int64_t end) {
    shares.layers(begin, end, [&](int64_t l, int64_t from, int64_t to) {
      const View<T> sum{sums.data() + l * area, batch, 1};
      const Elements out(grads[l]);
      T* direct = kScalarType<T> == grads[l].scalar_type() ? grads[l].mutable_data_ptr<T>() : nullptr;
      layers[l].columns(from, to, [&](int64_t first, int64_t last, View<T> rows) {
        for (int64_t at = first; at < last; at += direct ? last - first : kChunk) {
          const int64_t count = direct ? last - first : std::min(kChunk, last - at);
          T* product = direct ? direct + at : workspace<T, Scratch::rows_y>(batch * count);
          const int64_t line = direct ? layers[l].depth() : count;
          gemm_detail::fastest_product<T>(batch, count, batch, sum, rows.from(0, at - first), product, line, T(1),
                                          false, -kEverything);
          if (!direct)
            for (int64_t i = 0; i < batch; ++i) out.template write<T>(i, at, count, product + i * count);
        }
      });
    });
  });
  return grads;
}

}  // namespace

Tensor gram(const std::vector<Tensor>& features, bool) {
  check_gram(features);
  return any_double(features) ? run_gram<double>(features) : run_gram<float>(features);
}

std::vector<Tensor> gram_backward(const Tensor& grad, const std::vector<Tensor>& features, bool) {
  check_gram_backward(grad, features);
  const Tensor slopes = torch::stable::contiguous(grad);
  return with_compute_type(grad, [&](auto type) { return run_backward<decltype(type)>(slopes, features); });
}

}  // namespace kdkernels

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  // Products of every pair of samples, L x b x b. Each layer's features have the order of its dimensions. The gradients are b x
  // depth in the same order.
  m.def("gram(Tensor[] features, bool tf32=False) -> Tensor matrices");
  m.def("gram_backward(Tensor grad_matrices, Tensor[] features, bool tf32=False) -> Tensor[] grad_features");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("gram", TORCH_BOX(&kdkernels::gram));
  m.impl("gram_backward", TORCH_BOX(&kdkernels::gram_backward));
}
