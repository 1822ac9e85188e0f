// Float32 matrix products on AMX's int8 tiles, as accurate as float32 arithmetic in the norm.
//
// A piece of a row of A, or of a column of B, is written as integers of 23 bits, relative to its largest number. An integer has
// three digits of 8 bits: high·2^16 + middle·2^8 + low. Two numbers have nine products of digits, and the six largest are kept.
// The others are below 2^-22 of the product of the two largest numbers. The tiles sum digits exactly. The sums of a piece are
// converted to float once. Six tile products take a sixth of the time that the vector units need.
#pragma once

#if defined(__AMX_INT8__) && defined(__AVX512BW__)
#define KDKERNELS_AMX 1

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "vec.h"
#include "view.h"
#include "workspace.h"

namespace kdkernels::amx {

// Whether the processor has the tiles and the kernel lets this process use them. KDKERNELS_AMX=0 turns the tiles off.
inline bool available() {
  static const bool answer = [] {
    const char* wish = std::getenv("KDKERNELS_AMX");
    if (wish && wish[0] == '0') return false;
    constexpr long request_permission = 0x1023, tile_data = 18;
    unsigned eax, ebx, ecx, edx;
    __asm__("cpuid" : "=a"(eax), "=b"(ebx), "=c"(ecx), "=d"(edx) : "a"(7), "c"(0));
    constexpr unsigned tile = 1u << 24, int8 = 1u << 25;
    return (edx & int8) && (edx & tile) && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return answer;
}

// A tile has 16 lines of A, or 16 columns of B, by 64 values of the summation index.
inline constexpr int64_t kLines = 16, kDepth = 64, kTile = kLines * kDepth;
// One step of the block product reads a chunk of A and of B. A chunk has the three digits of two tiles.
inline constexpr int64_t kBlock = 2 * kLines, kChunk = 6 * kTile;
// An MC x KC block of A stays in an L2 cache of 2 MiB. A KC x 32 panel of B stays in an L1 cache of 48 KiB.
inline constexpr int64_t KC = 512, MC = 256;
// This number of multiply-adds per 32 x 32 block is worth another thread.
inline constexpr int64_t kGrain = 1 << 8;

inline int64_t blocks_of(int64_t lines) { return (lines + kBlock - 1) / kBlock; }
inline int64_t chunks_of(int64_t depths) { return (depths + kDepth - 1) / kDepth; }

// Return the length of the pieces, when `length` is cut into the fewest equal pieces of at most `limit`.
inline int64_t equal_piece(int64_t size, int64_t limit, int64_t multiple) {
  const int64_t count = (size + limit - 1) / limit;
  return round_up((size + count - 1) / count, multiple);
}

inline __mmask16 first(int64_t count) { return __mmask16((1u << std::clamp<int64_t>(count, 0, kLines)) - 1); }

// Magnitudes of floats have the order of their bits as integers. NaN and Inf come last.
inline __m512i magnitude(__m512 value) {
  return _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(0x7fffffff));
}

// The digits of 16 numbers, in the bytes of each lane. The lowest digit comes first.
inline __m512i digits(__m512 value, __m512 scale) {
  // Digits lie between -128 and 127. A digit plus 128 is a byte of the integer. Flipping the highest bit subtracts 128.
  const __m512i bias = _mm512_set1_epi32(0x00808080);
  return _mm512_xor_si512(_mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(value, scale)), bias), bias);
}

// Byte `part` of four vectors' lanes side by side.
template <int part>
__m512i gather(const __m512i (&lanes)[4]) {
  const auto move = [](__m512i x, auto byte) {  // byte `part` of a lane to byte `byte`
    constexpr int shift = 8 * (decltype(byte)::value - part);
    if constexpr (shift > 0) return _mm512_slli_epi32(x, shift);
    if constexpr (shift < 0) return _mm512_srli_epi32(x, -shift);
    return x;
  };
  __m512i all = move(lanes[0], std::integral_constant<int, 0>());
  all = _mm512_mask_mov_epi8(all, 0x2222222222222222, move(lanes[1], std::integral_constant<int, 1>()));
  all = _mm512_mask_mov_epi8(all, 0x4444444444444444, move(lanes[2], std::integral_constant<int, 2>()));
  return _mm512_mask_mov_epi8(all, 0x8888888888888888, move(lanes[3], std::integral_constant<int, 3>()));
}

// 16 lines x 64 depths in three tiles, two tiles apart. In a tile of A, the depths of a line are neighbours. In a tile of B,
// the lines of a depth are neighbours. The four digits of a word belong to depths that are 16 apart. Any order works if A and B
// share it.
template <bool by_line>
void pack_tile(const float* source, int64_t line, int64_t depth, const float* scale, int8_t* tiles) {
  alignas(64) float transposed[kTile];
  const float* quarters[4];
  int64_t step = by_line ? line : depth;
  for (int64_t q = 0; q < 4; ++q) quarters[q] = source + q * kLines * depth;
  if ((by_line ? depth : line) != 1) {
    for (int64_t q = 0; q < 4; ++q) {
      float* out = transposed + q * kLines * kLines;
      transpose_block<float>(quarters[q], by_line ? depth : line, kLines, 1, out, kLines);
      quarters[q] = out;
    }
    step = kLines;
  }
  const __m512 scales = _mm512_loadu_ps(scale);
  for (int64_t i = 0; i < kLines; ++i) {
    const __m512 factor = by_line ? _mm512_set1_ps(scale[i]) : scales;
    __m512i lanes[4];
    for (int64_t q = 0; q < 4; ++q) lanes[q] = digits(_mm512_loadu_ps(quarters[q] + i * step), factor);
    int8_t* row = tiles + i * kDepth;
    _mm512_store_si512(row, gather<2>(lanes));
    _mm512_store_si512(row + 2 * kTile, gather<1>(lanes));
    _mm512_store_si512(row + 4 * kTile, gather<0>(lanes));
  }
}

// Measure a block of 32 lines, then pack it into a row of chunks, half a chunk at a time. Element (i, k) is source[i * line + k
// * depth]. It is zero beyond `lines` and `depths`.
template <bool by_line>
class Panel {
 public:
  Panel(const float* source, int64_t line, int64_t depth, int64_t lines, int64_t depths, int8_t* out)
      : source_(source),
        line_(line),
        depth_(depth),
        lines_(lines),
        depths_(depths),
        halves_(2 * chunks_of(depths)),
        out_(out) {}

  const int8_t* data() const { return out_; }
  // The unit of a line's integers, times 2^8. It is NaN if the line has NaN or Inf.
  const float* units() const { return units_; }

  void finish() {
    while (step_ < 2 * halves_) advance();
  }

  // Pack the next half of a chunk, if there is one.
  void advance() {
    if (step_ >= 2 * halves_) return;
    const int64_t half = step_ % halves_, i = half % 2 * kLines, k = half / 2 * kDepth;
    if (step_ < halves_)
      measure(i, k);
    else
      pack(i, k);
    if (++step_ == halves_) set_scales();
  }

 private:
  void measure(int64_t i, int64_t k) {
    const int64_t lines = std::min(kLines, lines_ - i), depths = std::min(kDepth, depths_ - k);
    const float* from = source_ + i * line_ + k * depth_;
    if (line_ == 1) {
      const __mmask16 inside = first(lines);
      __m512i largest = _mm512_load_si512(largest_ + i);
      for (int64_t d = 0; d < depths; ++d)
        largest = _mm512_max_epu32(largest, magnitude(_mm512_maskz_loadu_ps(inside, from + d * depth_)));
      _mm512_store_si512(largest_ + i, largest);
      return;
    }
    for (int64_t l = 0; l < lines; ++l) {
      const float* row = from + l * line_;
      __m512i largest = _mm512_setzero_si512();
      for (int64_t d = 0; d < depths; d += kLines) {
        alignas(64) float apart[kLines] = {};
        if (depth_ != 1)
          for (int64_t r = 0; r < std::min(kLines, depths - d); ++r) apart[r] = row[(d + r) * depth_];
        const __m512 values = depth_ == 1 ? _mm512_maskz_loadu_ps(first(depths - d), row + d) : _mm512_load_ps(apart);
        largest = _mm512_max_epu32(largest, magnitude(values));
      }
      largest_[i + l] = std::max(largest_[i + l], uint32_t(_mm512_reduce_max_epu32(largest)));
    }
  }

  void set_scales() {
    // The digits 127, 127, 127 make 8355711, and rounding must not exceed it. If every number is below the second limit, fewer
    // digits remain.
    const __m512 integer = _mm512_set1_ps(8355000), limit = _mm512_set1_ps(1e38f);
    for (int64_t i = 0; i < kBlock; i += kLines) {
      const __m512i largest = _mm512_load_si512(largest_ + i);
      const __m512 scale = _mm512_min_ps(_mm512_div_ps(integer, _mm512_castsi512_ps(largest)), limit);
      const __mmask16 broken = _mm512_cmpge_epu32_mask(largest, _mm512_set1_epi32(0x7f800000));
      const __m512 unit = _mm512_div_ps(_mm512_set1_ps(256), scale);
      _mm512_store_ps(scales_ + i, scale);
      _mm512_store_ps(units_ + i, _mm512_mask_mov_ps(unit, broken, _mm512_set1_ps(__builtin_nanf(""))));
    }
  }

  void pack(int64_t i, int64_t k) const {
    const float* from = source_ + i * line_ + k * depth_;
    int8_t* tiles = out_ + k / kDepth * kChunk + i / kLines * kTile;
    if (lines_ >= i + kLines && depths_ >= k + kDepth && (line_ == 1 || depth_ == 1))
      return pack_tile<by_line>(from, line_, depth_, scales_ + i, tiles);
    alignas(64) float corner[kTile] = {};
    for (int64_t r = 0; r < std::min(lines_ - i, kLines); ++r)
      for (int64_t d = 0; d < std::min(depths_ - k, kDepth); ++d) corner[r * kDepth + d] = from[r * line_ + d * depth_];
    pack_tile<by_line>(corner, kDepth, 1, scales_ + i, tiles);
  }

  const float* source_;
  int64_t line_, depth_, lines_, depths_, halves_;
  int8_t* out_;
  int64_t step_ = 0;
  alignas(64) uint32_t largest_[kBlock] = {};
  alignas(64) float scales_[kBlock], units_[kBlock];
};

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The compiler's tile intrinsics do not say that they read and write memory.
inline void settle_memory() { __asm__ volatile("" ::: "memory"); }

// Products of digits, sorted by their power of 2^8: high·high, then high·middle, then high·low and middle·middle.
inline constexpr int64_t kPowers = 3;

// out (3 x 32 x 32) = the sums of one block of A with one block of B over `chunks` steps, one per power. Tiles 0-3 sum, tiles
// 4-5 hold A, tiles 6-7 hold B. meanwhile(step) runs between the steps, kPowers * chunks times, because the vector units are
// free while the tiles multiply.
template <typename F>
void block_product(int64_t chunks, const int8_t* a, const int8_t* b, int32_t* out, const F& meanwhile) {
  enum { high, middle, low };
  constexpr int64_t line = 64, row = kBlock * sizeof(int32_t);
  const auto multiply = [](const int8_t* left, int part_a, const int8_t* right, int part_b)
                            __attribute__((always_inline)) {
                              _tile_loadd(4, left + 2 * part_a * kTile, line);
                              _tile_loadd(6, right + 2 * part_b * kTile, line);
                              _tile_dpbssd(0, 4, 6);
                              _tile_loadd(7, right + (2 * part_b + 1) * kTile, line);
                              _tile_dpbssd(1, 4, 7);
                              _tile_loadd(5, left + (2 * part_a + 1) * kTile, line);
                              _tile_dpbssd(2, 5, 6);
                              _tile_dpbssd(3, 5, 7);
                            };
  int64_t step = 0;
  const auto sum = [&](int64_t power, const auto& products) __attribute__((always_inline)) {
    settle_memory();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      products(a + chunk * kChunk, b + chunk * kChunk);
      settle_memory();
      meanwhile(step++);
    }
    int32_t *above = out + power * kBlock * kBlock, *below = above + kLines * kBlock;
    _tile_stored(0, above, row);
    _tile_stored(1, above + kLines, row);
    _tile_stored(2, below, row);
    _tile_stored(3, below + kLines, row);
    settle_memory();
  };
  sum(0, [&](const int8_t* x, const int8_t* y) __attribute__((always_inline)) { multiply(x, high, y, high); });
  sum(1, [&](const int8_t* x, const int8_t* y) __attribute__((always_inline)) {
    multiply(x, high, y, middle);
    multiply(x, middle, y, high);
  });
  sum(2, [&](const int8_t* x, const int8_t* y) __attribute__((always_inline)) {
    multiply(x, high, y, low);
    multiply(x, middle, y, middle);
    multiply(x, low, y, high);
  });
}

// A block of sums that is being added to C.
struct Finished {
  alignas(64) int32_t sums[kPowers * kBlock * kBlock];
  alignas(64) float row_units[kBlock], column_units[kBlock];
  float* c = nullptr;
  int64_t ldc = 0, rows = 0, columns = 0;
  bool accumulate = false;

  // C [+]= the rows from `begin` to `end` of the block.
  void add(int64_t begin, int64_t end) const {
    const auto power = [&](int64_t p, int64_t at) {
      return _mm512_cvtepi32_ps(_mm512_load_si512(sums + p * kBlock * kBlock + at));
    };
    const __m512 base = _mm512_set1_ps(256);
    for (int64_t i = begin; i < std::min(end, rows); ++i)
      for (int64_t j = 0; j < kBlock; j += kLines) {
        const int64_t at = i * kBlock + j;
        const __mmask16 inside = first(columns - j);
        const __m512 sum = _mm512_fmadd_ps(_mm512_fmadd_ps(power(0, at), base, power(1, at)), base, power(2, at));
        const __m512 by_row = _mm512_mul_ps(sum, _mm512_set1_ps(row_units[i])), unit = _mm512_load_ps(column_units + j);
        float* out = c + i * ldc + j;
        const __m512 old = accumulate ? _mm512_maskz_loadu_ps(inside, out) : _mm512_setzero_ps();
        _mm512_mask_storeu_ps(out, inside, _mm512_fmadd_ps(by_row, unit, old));
      }
  }
};

// Call f(term, begin, count) for pieces of at most KC of the terms' depths.
template <typename F>
void for_each_piece(const std::vector<Term<float>>& terms, const F& f) {
  for (const Term<float>& term : terms) {
    const int64_t length = equal_piece(term.depth, KC, kDepth);
    for (int64_t begin = 0; begin < term.depth; begin += length) f(term, begin, std::min(length, term.depth - begin));
  }
}

inline bool suits(int64_t m, int64_t n, int64_t k) { return std::min({m, n, k}) >= 32 && available(); }

// C (m x n) = [C +] the sum of the terms, computed by all threads. Row 0 meets the diagonal at column `diagonal`. Blocks below
// the diagonal are not written. One piece of A is packed at a time, and all panels of B are multiplied with it. While the tiles
// multiply one block, the vector units add the previous block to C, and measure and pack the next panel.
inline void product(int64_t m, int64_t n, const std::vector<Term<float>>& terms, float* c, int64_t ldc, bool accumulate,
                    int64_t diagonal) {
  const int64_t height = equal_piece(m, MC, kBlock), panel_size = chunks_of(KC) * kChunk;
  int64_t depth = 0;
  for (const Term<float>& term : terms) depth += term.depth;
  // Call f(j, blocks) for each stack of blocks in rows [i, i + height) and 32 columns from j.
  const auto for_each_stack = [&](int64_t i, const auto& f) {
    for (int64_t j = std::max<int64_t>(0, i + diagonal) / kBlock * kBlock; j < n; j += kBlock)
      f(j, blocks_of(std::min({height, m - i, std::min(j + kBlock, n) - i - diagonal})));
  };
  int64_t total = 0;
  for (int64_t i = 0; i < m; i += height) for_each_stack(i, [&](int64_t, int64_t blocks) { total += blocks; });

  parallel_blocks(total, 1, 1 + kGrain / depth, [&](int64_t begin, int64_t end) {
    int8_t* packed_a = workspace<int8_t, Scratch::packed_a>(height / kBlock * panel_size);
    int8_t* packed_b = workspace<int8_t, Scratch::packed_b>(2 * panel_size);
    alignas(64) float units_a[MC];
    Finished blocks_of_sums[2];
    int64_t turn = 0;
    const TileConfig config;
    _tile_loadconfig(&config);
    for (int64_t ic = 0; ic < m; ic += height) {
      struct Stack {
        int64_t column, begin, end;
      };
      std::vector<Stack> stacks;  // this thread's
      for_each_stack(ic, [&](int64_t j, int64_t blocks) {
        const Stack own{j, std::max<int64_t>(0, begin), std::min(blocks, end)};
        if (own.begin < own.end) stacks.push_back(own);
        begin -= blocks, end -= blocks;
      });
      if (stacks.empty()) continue;
      for_each_piece(terms, [&](const Term<float>& term, int64_t pc, int64_t kc) {
        const int64_t chunks = chunks_of(kc), steps = kPowers * chunks;
        const int64_t share = (kBlock + steps - 1) / steps;
        for (int64_t i = ic; i < std::min(ic + height, m); i += kBlock) {
          Panel<true> piece(term.a.at(i, pc), term.a.row, term.a.col, m - i, kc,
                            packed_a + (i - ic) / kBlock * panel_size);
          piece.finish();
          std::memcpy(units_a + (i - ic), piece.units(), kBlock * sizeof(float));
        }
        const auto panel_of = [&](size_t s) {
          const int64_t j = s < stacks.size() ? stacks[s].column : n;
          return Panel<false>(term.b.at(pc, j), term.b.col, term.b.row, n - j, j < n ? kc : 0,
                              packed_b + s % 2 * panel_size);
        };
        Panel<false> panel = panel_of(0);
        panel.finish();
        for (size_t s = 0; s < stacks.size(); ++s) {
          const Stack& stack = stacks[s];
          const int64_t due_every =
              kPowers * (stack.end - stack.begin);  // so that the next panel is ready when the last block is done
          Panel<false> next = panel_of(s + 1);
          int64_t due = 0;
          for (int64_t block = stack.begin; block < stack.end; ++block, turn ^= 1) {
            const Finished& before = blocks_of_sums[turn ^ 1];
            Finished& own = blocks_of_sums[turn];
            block_product(chunks, packed_a + block * panel_size, panel.data(), own.sums, [&](int64_t step) {
              before.add(step * share, (step + 1) * share);
              for (due += 4; due >= due_every; due -= due_every) next.advance();
            });
            const int64_t i = block * kBlock;
            for (int64_t r = 0; r < kBlock; ++r) own.row_units[r] = term.alpha * units_a[i + r];
            std::memcpy(own.column_units, panel.units(), sizeof own.column_units);
            own.c = c + (ic + i) * ldc + stack.column;
            own.ldc = ldc;
            own.rows = std::min(kBlock, m - ic - i);
            own.columns = std::min(kBlock, n - stack.column);
            own.accumulate = accumulate || pc > 0 || &term != terms.data();
          }
          panel = next;
        }
      });
    }
    blocks_of_sums[turn ^ 1].add(0, kBlock);
    _tile_release();
  });
}

}  // namespace kdkernels::amx

#endif
