// Convolutions with 3 x 3 weights and a zero border of one, with Winograd's algorithm F(2 x 2, 3 x 3). It needs 4
// multiplications per output where the definition needs 9. It computes 2 x 2 outputs from 4 x 4 inputs d:
//
//   y = Aᵀ [Σ_channels (G w Gᵀ) ∘ (Bᵀ d B)] A,
//
// Each of the 16 positions of ∘ is a matrix product of tiles x channels and channels x channels. The gradient to the inputs is
// a convolution of the gradient of the outputs. The gradient to the weights is Gᵀ [Σ_tiles (Bᵀ d B) ∘ (A dy Aᵀ)] G.
//
// The matrices are cut into blocks of kSide x kSide. A thread works on 16 blocks of each factor and of the product. They stay
// in its L2 cache. The result is the only tensor of the maps' size.
#include <algorithm>

#include "../checks/convolution.h"
#include "lanes.h"
#include "parallel.h"
#include "tensors.h"
#include "workspace.h"

namespace kdkernels {
namespace {

constexpr int64_t kSide = 64;
constexpr int64_t kPositions = 16;

template <typename T>
using V = typename Vec<T>::type;
template <typename T>
inline constexpr int64_t kLanes = Vec<T>::size;
template <typename T>
inline constexpr int64_t kBlock = spread<T>(kSide * kSide);  // elements between the blocks of two positions

// Rows of a register tile. The registers hold its sums and two columns of vectors. The width of a strip is a multiple of it.
#if defined(__AVX512F__)
constexpr int64_t kMostRows = 8;
#else
constexpr int64_t kMostRows = 4;
#endif
template <typename T>
inline constexpr int64_t kRows = std::min(kMostRows, kLanes<T>);

// The layout of a block is strips of kLanes columns, each strip row-major.
template <typename T>
constexpr int64_t place(int64_t row, int64_t column) {
  return column / kLanes<T> * kLanes<T> * kSide + row * kLanes<T> + column % kLanes<T>;
}

// A register tile of C = [C +] A B, or [C +] Aᵀ B.
template <typename T, bool transposed>
void tile(int64_t depth, const T* a, const T* b, T* c, bool accumulate) {
  constexpr int64_t lanes = kLanes<T>, rows = kRows<T>, next = lanes * kSide;
  V<T> left[rows], right[rows];
#pragma GCC unroll 16
  for (int64_t i = 0; i < rows; ++i) {
    left[i] = accumulate ? load<T>(c + i * lanes) : V<T>{};
    right[i] = accumulate ? load<T>(c + next + i * lanes) : V<T>{};
  }
  for (int64_t k = 0; k < depth; ++k, b += lanes) {
    const V<T> b0 = load<T>(b), b1 = load<T>(b + next);
    const T* factors = a + (transposed ? k * lanes : place<T>(0, k));
#pragma GCC unroll 16
    for (int64_t i = 0; i < rows; ++i) {
      const T factor = factors[transposed ? i : i * lanes];
      left[i] += factor * b0;
      right[i] += factor * b1;
    }
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < rows; ++i) {
    store<T>(c + i * lanes, left[i]);
    store<T>(c + next + i * lanes, right[i]);
  }
}

// C = [C +] A B, or [C +] Aᵀ B, in the blocks of all positions. Rows that only fill up a register tile are computed too.
template <typename T, bool transposed>
void multiply(int64_t rows, int64_t columns, int64_t depth, const T* a, const T* b, T* c, bool accumulate) {
  for (int64_t p = 0; p < kPositions; ++p, a += kBlock<T>, b += kBlock<T>, c += kBlock<T>)
    for (int64_t j = 0; j < columns; j += 2 * kLanes<T>)
      for (int64_t i = 0; i < rows; i += kRows<T>)
        tile<T, transposed>(depth, a + (transposed ? place<T>(0, i) : place<T>(i, 0)), b + place<T>(0, j),
                            c + place<T>(i, j), accumulate);
}

// The four matrices, each applied to a line of numbers.
struct Inputs {  // Bᵀ
  static constexpr int from = 4, to = 4;
  template <typename N>
  static void apply(const N* d, N* out) {
    out[0] = d[0] - d[2], out[1] = d[1] + d[2], out[2] = d[2] - d[1], out[3] = d[1] - d[3];
  }
};

struct Outputs {  // Aᵀ
  static constexpr int from = 4, to = 2;
  template <typename N>
  static void apply(const N* m, N* out) {
    out[0] = m[0] + m[1] + m[2], out[1] = m[1] - m[2] - m[3];
  }
};

struct OutputGradients {  // A
  static constexpr int from = 2, to = 4;
  template <typename N>
  static void apply(const N* g, N* out) {
    out[0] = g[0], out[1] = g[0] + g[1], out[2] = g[0] - g[1], out[3] = -g[1];
  }
};

struct Weights {  // G
  static constexpr int from = 3, to = 4;
  template <typename N>
  static void apply(const N* w, N* out) {
    const N ends = (w[0] + w[2]) * 0.5f, middle = w[1] * 0.5f;
    out[0] = w[0], out[1] = ends + middle, out[2] = ends - middle, out[3] = w[2];
  }
};

struct WeightGradients {  // Gᵀ
  static constexpr int from = 4, to = 3;
  template <typename N>
  static void apply(const N* m, N* out) {
    const N sum = (m[1] + m[2]) * 0.5f;
    out[0] = m[0] + sum, out[1] = (m[1] - m[2]) * 0.5f, out[2] = sum + m[3];
  }
};

// Transform a square of vectors in both directions: M x Mᵀ.
template <typename M, typename N>
void transform(const N (&in)[M::from][M::from], N (&out)[M::to][M::to]) {
  N lines[M::to][M::from];
#pragma GCC unroll 4
  for (int j = 0; j < M::from; ++j) {
    N column[M::from], transformed[M::to];
#pragma GCC unroll 4
    for (int i = 0; i < M::from; ++i) column[i] = in[i][j];
    M::apply(column, transformed);
#pragma GCC unroll 4
    for (int i = 0; i < M::to; ++i) lines[i][j] = transformed[i];
  }
#pragma GCC unroll 4
  for (int i = 0; i < M::to; ++i) M::apply(lines[i], out[i]);
}

// One vector of the block of each position.
template <typename T>
void load_positions(const T* blocks, V<T> (&out)[4][4]) {
#pragma GCC unroll 16
  for (int64_t p = 0; p < kPositions; ++p) out[p / 4][p % 4] = load<T>(blocks + p * kBlock<T>);
}

template <typename T>
void store_positions(const V<T> (&values)[4][4], T* blocks) {
#pragma GCC unroll 16
  for (int64_t p = 0; p < kPositions; ++p) store<T>(blocks + p * kBlock<T>, values[p / 4][p % 4]);
}

// Up to kSide rows or channels, from `begin` on.
struct Range {
  int64_t begin, count;

  Range(int64_t block, int64_t size) : begin(block * kSide), count(std::min(kSide, size - begin)) {}
};

int64_t blocks_of(int64_t size) { return (size + kSide - 1) / kSide; }

// channels_last maps, as tiles of 2 x 2 pixels.
template <typename T>
class Tiles {
 public:
  int64_t count, channels;

  explicit Tiles(const Tensor& maps)
      : channels(maps.size(1)),
        height_(maps.size(2)),
        width_(maps.size(3)),
        down_((height_ + 1) / 2),
        across_((width_ + 1) / 2),
        steps_{maps.stride(0), maps.stride(2), maps.stride(3)},
        data_(static_cast<T*>(const_cast<void*>(maps.const_data_ptr()))) {
    count = maps.size(0) * down_ * across_;
  }

  // The size x size pixels around a tile. A pixel outside of the map is null.
  template <int size>
  void find(int64_t tile, int64_t channel, T* (&pixels)[size][size]) const {
    const int64_t top = tile / across_ % down_ * 2 - (size - 2) / 2, left = tile % across_ * 2 - (size - 2) / 2;
    T* image = data_ + tile / across_ / down_ * steps_[0] + channel;
    for (int i = 0; i < size; ++i)
      for (int j = 0; j < size; ++j) {
        const int64_t y = top + i, x = left + j;
        const bool inside = 0 <= y && y < height_ && 0 <= x && x < width_;
        pixels[i][j] = inside ? image + y * steps_[1] + x * steps_[2] : nullptr;
      }
  }

  // Transform the pixels of each tile and around it, into one block per position.
  template <typename M>
  void read(Range tiles, Range channels, T* blocks) const {
    alignas(64) static const T zeros[kSide] = {};
    for (int64_t t = 0; t < tiles.count; ++t) {
      T* pixels[M::from][M::from];
      find(tiles.begin + t, channels.begin, pixels);
      for (auto& line : pixels)
        for (T*& pixel : line) pixel = pixel ? pixel : const_cast<T*>(zeros);
      for (int64_t c = 0; c < channels.count; c += kLanes<T>) {
        V<T> values[M::from][M::from], transformed[4][4];
#pragma GCC unroll 16
        for (int i = 0; i < M::from * M::from; ++i)
          values[i / M::from][i % M::from] = load<T>(pixels[i / M::from][i % M::from] + c);
        transform<M>(values, transformed);
        store_positions<T>(transformed, blocks + place<T>(t, c));
      }
    }
  }

  void write(Range tiles, Range channels, const T* blocks) const {
    for (int64_t t = 0; t < tiles.count; ++t) {
      T* pixels[2][2];
      find(tiles.begin + t, channels.begin, pixels);
      for (int64_t c = 0; c < channels.count; c += kLanes<T>) {
        V<T> positions[4][4], values[2][2];
        load_positions<T>(blocks + place<T>(t, c), positions);
        transform<Outputs>(positions, values);
        for (int i = 0; i < 4; ++i)
          if (pixels[i / 2][i % 2]) store<T>(pixels[i / 2][i % 2] + c, values[i / 2][i % 2]);
      }
    }
  }

 private:
  int64_t height_, width_, down_, across_, steps_[3];
  T* data_;
};

// Weights as an inputs x outputs matrix of 3 x 3 numbers.
template <typename T>
class Taps {
 public:
  int64_t inputs, outputs;

  explicit Taps(const Tensor& weight)
      : inputs(weight.size(1)),
        outputs(weight.size(0)),
        input_(weight.stride(1)),
        output_(weight.stride(0)),
        down_(weight.stride(2)),
        across_(weight.stride(3)),
        data_(static_cast<T*>(const_cast<void*>(weight.const_data_ptr()))) {}

  // The weights for the gradient to the inputs.
  Taps turned() const {
    Taps result = *this;
    std::swap(result.inputs, result.outputs);
    std::swap(result.input_, result.output_);
    result.data_ += 2 * (down_ + across_);
    result.down_ = -down_;
    result.across_ = -across_;
    return result;
  }

  void read(Range inputs, Range outputs, T* blocks) const {
    Panel panel;
    for (int64_t j = 0; j < outputs.count; j += kLanes<T>) {
      for_elements(inputs, outputs.begin + j, panel, [](T& copy, const T& weight) { copy = weight; });
      for (int64_t i = 0; i < inputs.count; ++i) {
        V<T> values[3][3], transformed[4][4];
        for (int64_t tap = 0; tap < 9; ++tap) values[tap / 3][tap % 3] = load<T>(panel[tap][i]);
        transform<Weights>(values, transformed);
        store_positions<T>(transformed, blocks + place<T>(i, j));
      }
    }
  }

  void write(Range inputs, Range outputs, const T* blocks) const {
    Panel panel;
    for (int64_t j = 0; j < outputs.count; j += kLanes<T>) {
      for (int64_t i = 0; i < inputs.count; ++i) {
        V<T> positions[4][4], values[3][3];
        load_positions<T>(blocks + place<T>(i, j), positions);
        transform<WeightGradients>(positions, values);
        for (int64_t tap = 0; tap < 9; ++tap) store<T>(panel[tap][i], values[tap / 3][tap % 3]);
      }
      for_elements(inputs, outputs.begin + j, panel, [](const T& copy, T& weight) { weight = copy; });
    }
  }

 private:
  // Weights of a block's inputs and one vector of outputs. They are far apart in memory.
  using Panel = T[9][kSide + 1][kLanes<T>];

  int64_t input_, output_, down_, across_;
  T* data_;

  // Call f with every element of a panel and its weight, in memory order.
  template <typename F>
  void for_elements(Range inputs, int64_t output, Panel& panel, const F& f) const {
    T* data = data_ + inputs.begin * input_ + output * output_;
    const auto for_taps = [&](int64_t i, int64_t lane) {
      for (int64_t tap = 0; tap < 9; ++tap)
        f(panel[tap][i][lane], data[i * input_ + lane * output_ + tap / 3 * down_ + tap % 3 * across_]);
    };
    if (input_ < output_) {
      for (int64_t lane = 0; lane < kLanes<T>; ++lane)
        for (int64_t i = 0; i < inputs.count; ++i) for_taps(i, lane);
    } else {
      for (int64_t i = 0; i < inputs.count; ++i)
        for (int64_t lane = 0; lane < kLanes<T>; ++lane) for_taps(i, lane);
    }
  }
};

// Room for `count` blocks at all positions.
template <typename T, Scratch use>
T* scratch_blocks(int64_t count = 1) {
  return workspace<T, use>(count * kPositions * kBlock<T>);
}

template <typename T>
void convolve(const Tiles<T>& maps, const Taps<T>& weight, const Tiles<T>& result) {
  const int64_t rows = blocks_of(maps.count), columns = blocks_of(weight.outputs), depths = blocks_of(weight.inputs);
  parallel_blocks(columns * rows, 1, 1, [&](int64_t begin, int64_t end) {
    T *inputs = scratch_blocks<T, Scratch::packed_a>(), *factors = scratch_blocks<T, Scratch::packed_b>(depths),
      *sums = scratch_blocks<T, Scratch::product>();
    const auto factors_at = [&](int64_t depth) { return factors + depth * kPositions * kBlock<T>; };
    for (int64_t b = begin; b < end; ++b) {
      const Range tiles(b % rows, maps.count), outputs(b / rows, weight.outputs);
      if (b == begin || b % rows == 0)
        for (int64_t depth = 0; depth < depths; ++depth)
          weight.read({depth, weight.inputs}, outputs, factors_at(depth));
      for (int64_t depth = 0; depth < depths; ++depth) {
        const Range channels(depth, weight.inputs);
        maps.template read<Inputs>(tiles, channels, inputs);
        multiply<T, false>(tiles.count, outputs.count, channels.count, inputs, factors_at(depth), sums, depth > 0);
      }
      result.write(tiles, outputs, sums);
    }
  });
}

template <typename T>
void gradient_of_weights(const Tiles<T>& maps, const Tiles<T>& grad, const Taps<T>& result) {
  const int64_t rows = blocks_of(maps.channels), columns = blocks_of(grad.channels);
  parallel_blocks(rows * columns, 1, 1, [&](int64_t begin, int64_t end) {
    T *inputs = scratch_blocks<T, Scratch::packed_a>(), *outputs = scratch_blocks<T, Scratch::packed_b>(),
      *sums = scratch_blocks<T, Scratch::product>();
    for (int64_t b = begin; b < end; ++b) {
      const Range row(b / columns, maps.channels), column(b % columns, grad.channels);
      for (int64_t block = 0; block < blocks_of(maps.count); ++block) {
        const Range tiles(block, maps.count);
        maps.template read<Inputs>(tiles, row, inputs);
        grad.template read<OutputGradients>(tiles, column, outputs);
        multiply<T, true>(row.count, column.count, tiles.count, inputs, outputs, sums, block > 0);
      }
      result.write(row, column, sums);
    }
  });
}

Tensor new_maps(const Tensor& like, const std::vector<int64_t>& shape, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  return torch::stable::empty(shape, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

}  // namespace

Tensor convolution(const Tensor& maps, const Tensor& weight, bool transposed) {
  check_convolution(maps, weight, transposed);
  const int64_t outputs = weight.size(transposed ? 1 : 0);
  const Tensor result = new_maps(maps, {maps.size(0), outputs, maps.size(2), maps.size(3)}, true);
  with_compute_type(maps, [&](auto zero) {
    using T = decltype(zero);
    const Taps<T> taps(weight);
    convolve<T>(Tiles<T>(maps), transposed ? taps.turned() : taps, Tiles<T>(result));
  });
  return result;
}

Tensor convolution_weight(const Tensor& maps, const Tensor& grad, bool channels_last) {
  check_convolution_weight(maps, grad);
  const Tensor result = new_maps(maps, {grad.size(1), maps.size(1), 3, 3}, channels_last);
  with_compute_type(maps, [&](auto zero) {
    using T = decltype(zero);
    gradient_of_weights<T>(Tiles<T>(maps), Tiles<T>(grad), Taps<T>(result));
  });
  return result;
}

}  // namespace kdkernels

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  // A convolution with 3 x 3 weights and a zero border of one. Channels are a multiple of 32 and neighbours in memory.
  // Transposed, it computes the gradient to the inputs from the gradient of the outputs. The second operator computes the
  // gradient to the weights.
  m.def("convolution(Tensor maps, Tensor weight, bool transposed) -> Tensor");
  m.def("convolution_weight(Tensor maps, Tensor grad, bool channels_last) -> Tensor grad_weight");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("convolution", TORCH_BOX(&kdkernels::convolution));
  m.impl("convolution_weight", TORCH_BOX(&kdkernels::convolution_weight));
}
