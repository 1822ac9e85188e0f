// Matrix products in tiles of 64 x 64, one block per tile. Panels of the operands are copied to shared memory a few
// steps ahead of the tensor cores. Two half-precision operands are multiplied as they are, which is exact. Each float
// is split into two tf32 halves, which keeps its accuracy, or is rounded to tf32 if this is allowed.
#pragma once

#include <type_traits>

#include "elements.cuh"
#include "tuning.cuh"

namespace kdkernels {

constexpr int kLines = 2, kColumns = 4;  // blocks of 16 x 8 in a quarter

// The unit in which tensor cores multiply numbers A and B: pairs if both are half precision, otherwise the compute
// type.
template <typename T, typename A, typename B>
using Unit = std::conditional_t<std::is_same_v<A, B> && kIsHalf<A>, HalfPair<A>, T>;

// Numbers that are neighbours along one dimension, and `stride` apart along the other.
template <typename T>
struct Matrix {
  using Number = T;
  const T* data;
  int64_t stride;
  bool vectors;  // pointers, strides and sizes are multiples of 16 bytes

  __host__ __device__ Matrix from(int64_t offset) const { return {data + offset, stride, vectors}; }

  // Begin to copy `Width` numbers, or zeros, to shared memory. Along says which dimension the neighbours have.
  template <bool Along, int Width>
  __device__ void copy(T* shared, int row, int k, bool valid) const {
    const int64_t offset = Along ? row * stride + k : k * stride + row;
    if constexpr (Width * sizeof(T) >= 4)
      copy_async<Width * sizeof(T)>(shared, valid ? data + offset : data, valid);
    else
      *shared = valid ? data[offset] : T(0);  // the hardware copies at least four bytes
  }
};

// A panel of one operand, 64 x Depth. Neighbours in memory are also neighbours in shared memory, along the depth or
// across it. Lines in shared memory are padded, so that the lanes of a warp read from different banks.
template <typename T, bool Along, int Depth>
struct Panel {
  static constexpr int kTogether = 16 / int(sizeof(T));
  static constexpr int kPitch = Along ? Depth + (kTogether > 4 ? kTogether : 4) : kTile + 32 / int(sizeof(T));
  static constexpr int kSize = (Along ? kTile : Depth) * kPitch;

  // The order in which lines are written. Two lines of 64 bytes are written at a time. A line shares banks with its
  // neighbours, but not with the fourth line after it.
  static __device__ int line_of(int place) {
    if (!Along || Depth * sizeof(T) > 64) return place;
    return place / 8 * 8 + place % 2 * 4 + place % 8 / 2;
  }

  // Begin to copy. Missing rows and depths become zeros.
  template <typename Source>
  static __device__ void load(T* panel, const Source& source, int row, int rows, int begin, int end) {
    const auto copy = [&](auto together) {
      constexpr int width = decltype(together)::value;
      constexpr int length = Along ? Depth : kTile, lines = Along ? kTile : Depth, pieces = length / width;
      static_assert(lines * pieces % kTileThreads == 0);
#pragma unroll 2  // more would need more registers
      for (int step = 0; step < lines * pieces / kTileThreads; ++step) {
        const int i = step * kTileThreads + int(threadIdx.x);
        const int line = line_of(i / pieces), column = i % pieces * width;
        const int r = row + (Along ? line : column), k = begin + (Along ? column : line);
        source.template copy<Along, width>(panel + line * kPitch + column, r, k, r < rows && k < end);
      }
    };
    if (source.vectors)
      copy(std::integral_constant<int, kTogether>());
    else
      copy(std::integral_constant<int, 1>());
  }

  // Unit k of a row.
  template <typename U>
  static __device__ U at(const T* panel, int row, int k) {
    if constexpr (std::is_same_v<U, HalfPair<T>>) {
      static_assert(Along);
      return *reinterpret_cast<const HalfPair<T>*>(panel + row * kPitch + 2 * k);
    } else {
      return number<U>(Along ? panel[row * kPitch + k] : panel[k * kPitch + row]);
    }
  }
};

// The bits of x, prepared so that truncation to 11 bits of mantissa, which tensor cores do, rounds x to tf32.
__device__ inline unsigned rounded(float x) { return __float_as_uint(x) + 0x1000u; }

// Rounding turns some NaN into zero. The product with zero restores them.
__device__ inline float as_tf32(float x) { return x * 0.0f + __uint_as_float(rounded(x)); }

// The remainder of x is exact and has at most 12 bits.
__device__ inline float upper_half(float x) { return __uint_as_float(rounded(x) & 0xffffe000u); }

// Apply f to numbers E. Half-precision numbers are their own upper halves, so they do not change.
template <typename E, int M, int N, typename F>
__device__ void apply(const F& f, const float (&numbers)[M][N], float (&results)[M][N]) {
#pragma unroll
  for (int i = 0; i < M; ++i)
#pragma unroll
    for (int e = 0; e < N; ++e) results[i][e] = kIsHalf<E> ? numbers[i][e] : f(numbers[i][e]);
}

// c += a b for numbers A and B. The lower halves of floats count unless `tf32`. The lower halves of half-precision
// numbers are 0.
//
// The flag is not a template argument. As one, it would double the kernels, and save 5 % of the instructions with tf32
// and none without (counted for sm_90).
template <typename A, typename B, int M, int N>
__device__ void multiply_units(float (&c)[M][N][4], const float (&a)[M][4], const float (&b)[N][2], bool tf32) {
  float a_upper[M][4], b_upper[N][2];
  if (tf32) {
    apply<A>(as_tf32, a, a_upper);
    apply<B>(as_tf32, b, b_upper);
  } else {
    apply<A>(upper_half, a, a_upper);
    apply<B>(upper_half, b, b_upper);
    float a_lower[M][4], b_lower[N][2];
    apply<A>([](float x) { return x - upper_half(x); }, a, a_lower);
    apply<B>([](float x) { return x - upper_half(x); }, b, b_lower);
    if constexpr (!kIsHalf<A>) multiply(c, a_lower, b_upper);
    if constexpr (!kIsHalf<B>) multiply(c, a_upper, b_lower);
  }
  multiply(c, a_upper, b_upper);
}

// Products of other units are exact, or as accurate as double.
template <typename A, typename B, typename T, typename U, int M, int N>
__device__ void multiply_units(T (&c)[M][N][4], const U (&a)[M][4], const U (&b)[N][2], bool) {
  multiply(c, a, b);
}

// One product, restricted to the depths from begin to end.
template <typename A, typename B = A>
struct Term {
  A a;
  B b;
  int begin, end;
};

// A tile of a product, distributed over the threads of a block. A thread has the entries where its rows and its columns
// cross.
template <typename T>
struct Tile {
  static constexpr int kMyRows = 2 * kLines, kMyColumns = 2 * kColumns;
  T entries[kLines][kColumns][4] = {};

  static __device__ int row(int i) { return int(threadIdx.x) / kWarp / 2 * 32 + int(threadIdx.x) % kWarp / 4 + 8 * i; }
  static __device__ int column(int j) {
    return int(threadIdx.x) / kWarp % 2 * 32 + int(threadIdx.x) % 4 * 2 + j / 2 * 8 + j % 2;
  }

  // Calls f(i, j, entry) with the entry at row(i) and column(j). Compute what depends only on i or only on j before,
  // and read the kernel's parameters before. There are many entries, each behind its own branches, and the compiler
  // moves little out of them.
  template <typename F>
  __device__ void for_each(const F& f) {
#pragma unroll
    for (int i = 0; i < kMyRows; ++i)
#pragma unroll
      for (int j = 0; j < kMyColumns; ++j) f(i, j, entries[i / 2][j / 2][i % 2 * 2 + j % 2]);
  }
};

// The tile of a block, if only the tiles from the diagonal on are computed.
struct Place {
  int row, column;  // the tile's first entry

  static __device__ Place in_triangle(int index, int tiles_across) {
    int line = 0;
    for (; index >= tiles_across - line; ++line) index -= tiles_across - line;
    return {line * kTile, (line + index) * kTile};
  }
};

inline int tiles(int64_t size) { return int((size + kTile - 1) / kTile); }
__host__ __device__ inline int64_t triangle(int lines, int across) {
  return int64_t(lines) * across - int64_t(lines) * (lines - 1) / 2;
}

// The panels of both operands in shared memory. The operands have numbers A and B, and their product is computed in T.
template <typename T, bool AlongA, bool AlongB, typename NumberA, typename NumberB>
struct Stage {
  using U = Unit<T, NumberA, NumberB>;
  static constexpr int kDeep = kDepth * (std::is_same_v<U, T> ? 1 : 2);  // in numbers
  using A = Panel<NumberA, AlongA, kDeep>;
  using B = Panel<NumberB, AlongB, kDeep>;
  static constexpr int kBytes = A::kSize * int(sizeof(NumberA)) + B::kSize * int(sizeof(NumberB));
};
template <typename T, bool AlongA, bool AlongB, typename A = T, typename B = A>
inline constexpr int kTileBytes = kStages<T> * Stage<T, AlongA, AlongB, A, B>::kBytes;

// The tile at (row, column) of plus.a plus.b - minus.a minus.b, which has `rows` rows and `columns` columns. The sums
// of panels are added with rounding, because the additions of tensor cores truncate. `tf32`: round floats to tf32.
// `mirrored`: a equals b, and row equals column, so one panel serves both.
template <typename T, bool AlongA, bool AlongB, typename SourceA = Matrix<T>, typename SourceB = SourceA>
__device__ Tile<T> multiply_tiles(const Term<SourceA, SourceB>& plus, const Term<SourceA, SourceB>& minus, int row,
                                  int rows, int column, int columns, bool tf32 = false, bool mirrored = false) {
  using NumberA = typename SourceA::Number;
  using NumberB = typename SourceB::Number;
  using Panels = Stage<T, AlongA, AlongB, NumberA, NumberB>;
  using A = typename Panels::A;
  using B = typename Panels::B;
  using U = typename Panels::U;
  static_assert(kStages<T> * Panels::kBytes <= 48 * 1024);
  char* const memory = dynamic_shared_memory();
  const auto a_at = [&](int panel) { return reinterpret_cast<NumberA*>(memory + panel % kStages<T> * Panels::kBytes); };
  const auto b_at = [&](int panel) { return reinterpret_cast<NumberB*>(a_at(panel) + (mirrored ? 0 : A::kSize)); };
  const auto panels = [](const Term<SourceA, SourceB>& term) {
    return (term.end - term.begin + Panels::kDeep - 1) / Panels::kDeep;
  };
  const int first = panels(plus), count = first + panels(minus);

  const auto load = [&](int panel) {
    if (panel < count) {
      const Term<SourceA, SourceB> term = panel < first ? plus : minus;
      const int begin = term.begin + (panel < first ? panel : panel - first) * Panels::kDeep;
      A::load(a_at(panel), term.a, row, rows, begin, term.end);
      if (!mirrored) B::load(b_at(panel), term.b, column, columns, begin, term.end);
    }
    close_copies();
  };

  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int my_row = warp / 2 * 32 + lane / 4, my_column = warp % 2 * 32 + lane / 4, my_depth = lane % 4;
  Tile<T> tile;
#pragma unroll 1
  for (int panel = 1 - kStages<T>; panel < count; ++panel) {
    if (panel >= 0) {
      wait_copies<kStages<T> - 2>();
      __syncthreads();
    }
    load(panel + kStages<T> - 1);  // replaces the previous panel
    if (panel < 0) continue;
    const NumberA* const a_panel = a_at(panel);
    const NumberB* const b_panel = b_at(panel);
    T sums[kLines][kColumns][4] = {};
#pragma unroll
    for (int k = 0; k < kDepth; k += 8) {
      U a[kLines][4], b[kColumns][2];
#pragma unroll
      for (int i = 0; i < kLines; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          a[i][e] = A::template at<U>(a_panel, my_row + 16 * i + e % 2 * 8, k + my_depth + e / 2 * 4);
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) b[j][e] = B::template at<U>(b_panel, my_column + 8 * j, k + my_depth + e * 4);
      multiply_units<NumberA, NumberB>(sums, a, b, tf32);
    }
    const T sign = panel < first ? T(1) : T(-1);
#pragma unroll
    for (int i = 0; i < kLines; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) tile.entries[i][j][e] += sign * sums[i][j][e];
  }
  return tile;
}

}  // namespace kdkernels
