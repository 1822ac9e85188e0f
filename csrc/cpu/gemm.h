// Matrix products on strided views: C = beta * C + alpha * A * B, with C row-major.
//
// The loops follow Goto and van de Geijn. A KC x NC block of B is packed into panels of NR columns, and an MC x KC block of A
// into panels of MR rows. A register tile of MR x NR moves down the panels. Packing reads any strides, so a transposed operand
// costs nothing extra. A sum has at most KC products before it is added to C. This bounds the rounding error.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "gemm_amx.h"
#include "parallel.h"
#include "vec.h"
#include "view.h"
#include "workspace.h"

namespace kdkernels {

template <typename T>
struct Product {
  T alpha = 1;
  bool accumulate = false;  // add to C instead of overwriting it
  // Compute only the upper triangle. Register tiles that lie entirely below the diagonal are not written.
  bool upper = false;
};

namespace gemm_detail {

template <typename T>
inline constexpr int64_t kLanes = Vec<T>::size;
#if defined(__AVX512F__)
inline constexpr int MR = 14;  // 28 accumulators and two columns of B leave 2 of 32 registers free
#elif defined(__aarch64__)
inline constexpr int MR = 10;  // 20 accumulators: with 24, GCC 12 spills, because it loads elements of A early
#else
inline constexpr int MR = 6;  // 12 accumulators, two columns of B and one element of A take 15 of 16 registers
#endif
template <typename T>
inline constexpr int64_t NR = 2 * kLanes<T>;
inline constexpr int64_t KC = 256;
inline constexpr int64_t MC = 24 * MR;
inline constexpr int64_t NC = 1024;
// The number of elements that packing may write beyond the end of a panel.
template <typename T>
inline constexpr int64_t kSlack = round_up(MR, kLanes<T>) - MR;

// Copy `count` <= width lines of `length` elements into a panel laid out element by element: panel[k * width + line].
template <typename T, int64_t width>
void pack_panel(const T* source, int64_t line, int64_t element, int64_t count, int64_t length, T alpha, T* panel) {
  if (count == width && line == 1) {
    for (int64_t k = 0; k < length; ++k)
      for (int64_t i = 0; i < width; ++i) panel[k * width + i] = alpha * source[k * element + i];
    return;
  }
  int64_t k = 0;
  if (element == 1) {
    // A store may spill over into the next line, so this line is written first. kSlack is the room behind the last line.
    constexpr int64_t lanes = kLanes<T>;
    for (; k + lanes <= length; k += lanes)
      for (int64_t i = round_up(width, lanes) - lanes; i >= 0; i -= lanes)
        transpose_block<T>(source + i * line + k, line, std::clamp<int64_t>(count - i, 0, lanes), alpha,
                           panel + k * width + i, width);
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

// A tile at the right edge of C is computed in full in a buffer. Then the `cols` columns that exist are copied.
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

// C (m x n) = [C +] alpha * A * B on the calling thread. Row 0 meets the diagonal at column `diagonal`. Tiles below the
// diagonal are not written.
template <typename T>
void product(int64_t m, int64_t n, int64_t k, View<T> a, View<T> b, T* c, int64_t ldc, T alpha, bool accumulate,
             int64_t diagonal) {
  const auto sequence = std::make_integer_sequence<int, MR>{};
  T* packed_b = workspace<T, Scratch::packed_b>(KC * std::min(NC, round_up(n, NR<T>)));
  T* packed_a = workspace<T, Scratch::packed_a>(KC * std::min(MC, round_up(m, int64_t(MR))) + kSlack<T>);
  for (int64_t jc = 0; jc < n; jc += NC) {
    const int64_t nc = std::min(NC, n - jc);
    for (int64_t pc = 0; pc < k; pc += KC) {
      const int64_t kc = std::min(KC, k - pc);
      const bool add = accumulate || pc > 0;
      for (int64_t j = 0; j < nc; j += NR<T>)
        pack_panel<T, NR<T>>(b.at(pc, jc + j), b.col, b.row, std::min(NR<T>, nc - j), kc, alpha, packed_b + j * kc);
      for (int64_t ic = 0; ic < m; ic += MC) {
        const int64_t mc = std::min(MC, m - ic);
        if (jc + nc <= ic + diagonal) break;
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

// For few rows and columns. Every entry is a dot product of two contiguous lines, so nothing is packed.
template <typename T>
void few_entries(int64_t m, int64_t n, int64_t k, View<T> a, View<T> b, T* c, int64_t ldc, T alpha, bool accumulate,
                 int64_t diagonal) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = std::max<int64_t>(0, i + diagonal); j < n; ++j) {
      const T *left = a.at(i, 0), *right = b.at(0, j);
      typename Vec<T>::type sums[4] = {};
      int64_t l = 0;
      for (; l + 4 * lanes <= k; l += 4 * lanes)
        for (int64_t u = 0; u < 4; ++u) sums[u] += load<T>(left + l + u * lanes) * load<T>(right + l + u * lanes);
      const auto sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      T total = 0;
      for (int64_t lane = 0; lane < lanes; ++lane) total += sum[lane];
      for (; l < k; ++l) total += left[l] * right[l];
      T& out = c[i * ldc + j];
      out = accumulate ? out + alpha * total : alpha * total;
    }
}

// For a short sum over contiguous rows of B. The rows of C are combinations of these rows, so nothing is packed.
template <typename T>
void few_terms(int64_t m, int64_t n, int64_t k, View<T> a, View<T> b, T* c, int64_t ldc, T alpha, bool accumulate) {
  constexpr int64_t columns = 1024;  // so that these columns of all rows of B stay in the L1 cache
  for (int64_t jc = 0; jc < n; jc += columns)
    for (int64_t i = 0; i < m; ++i)
      for (int64_t l = 0; l < k; ++l) {
        const T factor = alpha * *a.at(i, l), *row = b.at(l, jc);
        T* out = c + i * ldc + jc;
        const int64_t count = std::min(columns, n - jc);
        if (l == 0 && !accumulate)
          for (int64_t j = 0; j < count; ++j) out[j] = factor * row[j];
        else
          for (int64_t j = 0; j < count; ++j) out[j] += factor * row[j];
      }
}

// Like `product`, with the fastest method for this size.
template <typename T>
void fastest_product(int64_t m, int64_t n, int64_t k, View<T> a, View<T> b, T* c, int64_t ldc, T alpha, bool accumulate,
                     int64_t diagonal) {
  if (std::max(m, n) <= 8 && a.col == 1 && b.row == 1)
    return few_entries<T>(m, n, k, a, b, c, ldc, alpha, accumulate, diagonal);
  if (0 < k && k <= 8 && b.col == 1) return few_terms<T>(m, n, k, a, b, c, ldc, alpha, accumulate);
#if KDKERNELS_AMX
  if constexpr (std::is_same_v<T, float>)
    if (amx::suits(m, n, k)) return amx::product(m, n, {{a, b, k, alpha}}, c, ldc, accumulate, diagonal);
#endif
  product<T>(m, n, k, a, b, c, ldc, alpha, accumulate, diagonal);
}

// The columns of part `part` of `count` when an m x n upper triangle is cut into `count` parts of equal area.
inline std::pair<int64_t, int64_t> equal_share(int64_t m, int64_t n, int64_t part, int64_t count) {
  const auto boundary = [&](int64_t p) {
    if (p == count) return n;
    const double rows = m, triangle = rows * rows / 2,
                 area = (n > m ? triangle + (n - m) * rows : n * double(n) / 2) * p / count;
    const double column = area < triangle ? std::sqrt(2 * area) : m + (area - triangle) / rows;
    return std::min(n, round_up(int64_t(column), 32));
  };
  return {boundary(part), boundary(part + 1)};
}

}  // namespace gemm_detail

// C (m x n, row stride ldc) = [C +] alpha * A (m x k) * B (k x n), computed by all threads.
template <typename T>
void gemm(int64_t m, int64_t n, int64_t k, View<T> a, View<T> b, T* c, int64_t ldc, Product<T> how = {}) {
  using namespace gemm_detail;
  constexpr int64_t everything = int64_t(1) << 62;
  // Below this number of multiply-adds, waking another thread costs more than it saves.
  constexpr int64_t grain = int64_t(1) << 18;
  const auto grain_of = [](int64_t work_per_element) { return 1 + grain / std::max<int64_t>(1, work_per_element); };
  if (k > 4 * std::max(m, n)) {
    // Every thread sums a part of the products. Otherwise all threads would pack the same long rows. The first part goes
    // straight to C. The other parts are added to it in order.
    const Blocks parts(k, 1, grain_of(m * n));
    T* partial = workspace<T, Scratch::partial_sums>((parts.count - 1) * m * n);
    parts.parallel([&](int64_t part, int64_t begin, int64_t end) {
      T* out = part == 0 ? c : partial + (part - 1) * m * n;
      fastest_product<T>(m, n, end - begin, a.from(0, begin), b.from(begin, 0), out, part == 0 ? ldc : n, how.alpha,
                         part == 0 && how.accumulate, how.upper ? 0 : -everything);
    });
    for (int64_t part = 1; part < parts.count; ++part)
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = how.upper ? i : 0; j < n; ++j) c[i * ldc + j] += partial[((part - 1) * m + i) * n + j];
    return;
  }
#if KDKERNELS_AMX
  if constexpr (std::is_same_v<T, float>)
    if (amx::suits(m, n, k))
      return amx::product(m, n, {{a, b, k, how.alpha}}, c, ldc, how.accumulate, how.upper ? 0 : -everything);
#endif
  const auto share = [&](int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    fastest_product<T>(i1 - i0, j1 - j0, k, a.from(i0, 0), b.from(0, j0), c + i0 * ldc + j0, ldc, how.alpha,
                       how.accumulate, how.upper ? i0 - j0 : -everything);
  };
  if (how.upper) {
    const Blocks parts(n, NR<T>, grain_of(k * m));
    parts.parallel([&](int64_t part, int64_t, int64_t) {
      const auto [begin, end] = equal_share(m, n, part, parts.count);
      share(0, m, begin, end);
    });
  } else if (m > n)
    Blocks(m, MR, grain_of(k * n)).parallel([&](int64_t, int64_t begin, int64_t end) { share(begin, end, 0, n); });
  else
    Blocks(n, NR<T>, grain_of(k * m)).parallel([&](int64_t, int64_t begin, int64_t end) { share(0, m, begin, end); });
}

// C (m x n) = the sum of the terms. Only the upper triangle of a symmetric C is computed.
template <typename T>
void gemm_upper(int64_t m, int64_t n, const std::vector<Term<T>>& terms, T* c, int64_t ldc) {
#if KDKERNELS_AMX
  if constexpr (std::is_same_v<T, float>) {
    const auto suits = [&](const Term<T>& term) { return amx::suits(m, n, term.depth) && term.depth <= 4 * n; };
    if (std::all_of(terms.begin(), terms.end(), suits)) return amx::product(m, n, terms, c, ldc, false, 0);
  }
#endif
  for (const Term<T>& term : terms)
    gemm<T>(m, n, term.depth, term.a, term.b, c, ldc, {term.alpha, &term != terms.data(), true});
}

}  // namespace kdkernels
