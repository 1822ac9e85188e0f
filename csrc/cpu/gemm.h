// Matrix products on strided views: C = beta * C + alpha * A * B, with C row-major.
//
// The loops are those of Goto and van de Geijn: a KC x NC block of B is packed into panels of NR columns, an MC x KC block of
// A into panels of MR rows, and a register tile of MR x NR walks down them. Packing reads any strides, so a transposed operand
// costs nothing extra. Sums run over at most KC products before they are added to C, which bounds the rounding error.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "parallel.h"
#include "vec.h"
#include "workspace.h"

namespace kdkernels {

// A read-only matrix: element (i, j) lies at data[i * row + j * col].
template <typename T>
struct View {
  const T* data;
  int64_t row, col;

  const T* at(int64_t i, int64_t j) const { return data + i * row + j * col; }
  View from(int64_t i, int64_t j) const { return {at(i, j), row, col}; }
  View transposed() const { return {data, col, row}; }
};

template <typename T>
struct Product {
  T alpha = 1;
  bool accumulate = false;  // add to C instead of overwriting it
  // Row offset of C's diagonal for a symmetric product of which only the upper triangle is wanted: register tiles that lie
  // entirely below it are left untouched.
  bool upper = false;
};

namespace gemm_detail {

template <typename T>
inline constexpr int64_t kLanes = Vec<T>::size;
#if defined(__AVX512F__)
inline constexpr int MR = 14;  // 28 accumulators, two columns of B, 2 of 32 registers to spare
#else
inline constexpr int MR = 6;  // 12 accumulators, two columns of B, one element of A: 15 of 16 registers
#endif
template <typename T>
inline constexpr int64_t NR = 2 * kLanes<T>;
inline constexpr int64_t KC = 256;
inline constexpr int64_t MC = 24 * MR;
inline constexpr int64_t NC = 1024;

// Copy `count` <= width lines of `length` elements into a panel laid out element by element: panel[k * width + line].
template <typename T, int64_t width>
void pack_panel(const T* source, int64_t line, int64_t element, int64_t count, int64_t length, T alpha, T* panel) {
  if (count == width && line == 1) {
    for (int64_t k = 0; k < length; ++k)
      for (int64_t i = 0; i < width; ++i) panel[k * width + i] = alpha * source[k * element + i];
    return;
  }
  int64_t k = 0;
  if constexpr (width % kLanes<T> == 0) {
    if (count == width && element == 1) {
      constexpr int64_t lanes = kLanes<T>;
      for (; k + lanes <= length; k += lanes)
        for (int64_t i = 0; i < width; i += lanes)
          transpose_block<T>(source + i * line + k, line, alpha, panel + k * width + i, width);
    }
  }
  for (; k < length; ++k) {
    for (int64_t i = 0; i < count; ++i) panel[k * width + i] = alpha * source[i * line + k * element];
    for (int64_t i = count; i < width; ++i) panel[k * width + i] = 0;
  }
}

// The register tile: `rows` x NR sums over `length`, added to or written over C.
template <typename T, int rows>
void tile(int64_t length, const T* a, const T* b, T* c, int64_t ldc, bool accumulate) {
  using V = typename Vec<T>::type;
  constexpr int64_t lanes = kLanes<T>;
  V left[rows], right[rows];
  for (int i = 0; i < rows; ++i) left[i] = right[i] = V{};
  for (int64_t k = 0; k < length; ++k, a += MR, b += NR<T>) {
    const V b0 = load<T>(b), b1 = load<T>(b + lanes);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      left[i] += a[i] * b0;
      right[i] += a[i] * b1;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    T* out = c + i * ldc;
    if (accumulate) {
      left[i] += load<T>(out);
      right[i] += load<T>(out + lanes);
    }
    store<T>(out, left[i]);
    store<T>(out + lanes, right[i]);
  }
}

template <typename T>
using Tile = void (*)(int64_t, const T*, const T*, T*, int64_t, bool);

template <typename T, int... i>
Tile<T> tile_of(int64_t rows, std::integer_sequence<int, i...>) {
  static constexpr Tile<T> tiles[] = {tile<T, i + 1>...};
  return tiles[rows - 1];
}

// One tile at the right edge of C: computed in full beside it, and the `cols` columns that exist copied over.
template <typename T>
void edge_tile(Tile<T> run, int64_t rows, int64_t cols, int64_t length, const T* a, const T* b, T* c, int64_t ldc,
               bool accumulate) {
  alignas(64) T buffer[MR * NR<T>];
  run(length, a, b, buffer, NR<T>, false);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) {
      T& out = c[i * ldc + j];
      out = accumulate ? out + buffer[i * NR<T> + j] : buffer[i * NR<T> + j];
    }
}

// One thread's share. `diagonal` is the column of C at which row 0 meets the diagonal; very negative when all is wanted.
template <typename T>
void serial(int64_t m, int64_t n, int64_t k, View<T> a, View<T> b, T* c, int64_t ldc, T alpha, bool accumulate,
            int64_t diagonal) {
  const auto sequence = std::make_integer_sequence<int, MR>{};
  T* packed_b = workspace<T, 0>(KC * std::min(NC, round_up(n, NR<T>)));
  T* packed_a = workspace<T, 1>(KC * std::min(MC, round_up(m, int64_t(MR))));
  for (int64_t jc = 0; jc < n; jc += NC) {
    const int64_t nc = std::min(NC, n - jc);
    for (int64_t pc = 0; pc < k; pc += KC) {
      const int64_t kc = std::min(KC, k - pc);
      const bool add = accumulate || pc > 0;
      for (int64_t j = 0; j < nc; j += NR<T>)
        pack_panel<T, NR<T>>(b.at(pc, jc + j), b.col, b.row, std::min(NR<T>, nc - j), kc, alpha, packed_b + j * kc);
      for (int64_t ic = 0; ic < m; ic += MC) {
        const int64_t mc = std::min(MC, m - ic);
        if (jc + nc <= ic + diagonal) continue;
        for (int64_t i = 0; i < mc; i += MR)
          pack_panel<T, MR>(a.at(ic + i, pc), a.row, a.col, std::min(int64_t(MR), mc - i), kc, T(1), packed_a + i * kc);
        for (int64_t j = 0; j < nc; j += NR<T>) {
          const int64_t cols = std::min(NR<T>, nc - j);
          for (int64_t i = 0; i < mc; i += MR) {
            if (jc + j + cols <= ic + i + diagonal) break;
            const int64_t rows = std::min(int64_t(MR), mc - i);
            const Tile<T> run = tile_of<T>(rows, sequence);
            T* out = c + (ic + i) * ldc + jc + j;
            if (cols == NR<T>)
              run(kc, packed_a + i * kc, packed_b + j * kc, out, ldc, add);
            else
              edge_tile<T>(run, rows, cols, kc, packed_a + i * kc, packed_b + j * kc, out, ldc, add);
          }
        }
      }
    }
  }
}

}  // namespace gemm_detail

// C (m x n, row stride ldc) = [C +] alpha * A (m x k) * B (k x n), the larger side of C shared out over the threads.
template <typename T>
void gemm(int64_t m, int64_t n, int64_t k, View<T> a, View<T> b, T* c, int64_t ldc, Product<T> how = {}) {
  using namespace gemm_detail;
  constexpr int64_t everything = int64_t(1) << 62;
  const auto share = [&](int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    serial<T>(i1 - i0, j1 - j0, k, a.from(i0, 0), b.from(0, j0), c + i0 * ldc + j0, ldc, how.alpha, how.accumulate,
              how.upper ? i0 - j0 : -everything);
  };
  // Below this many multiply-adds waking another thread costs more than it saves.
  const int64_t grain = std::max<int64_t>(1, (int64_t(1) << 18) / std::max<int64_t>(1, k * std::min(m, n)));
  if (m > n)
    parallel_blocks(m, MR, grain, [&](int64_t begin, int64_t end) { share(begin, end, 0, n); });
  else
    parallel_blocks(n, NR<T>, grain, [&](int64_t begin, int64_t end) { share(0, m, begin, end); });
}

}  // namespace kdkernels
