// Float32 matrix products on AMX's bfloat16 tiles, as accurate as float32 arithmetic.
//
// A float32 has 24 significant bits, so it is exactly the sum of three bfloat16 numbers h + m + l of 8 bits each. Of the nine
// products of two such sums, six are kept; the rest (m·l, l·m, l·l) is below 2^-22 of the whole, less than the rounding of one
// float32 product after another. Six tile products still take a third of the time of the same work on the vector units.
#pragma once

#if defined(__AMX_BF16__) && defined(__AVX512BW__)
#define KDKERNELS_AMX 1

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "vec.h"
#include "view.h"
#include "workspace.h"

namespace kdkernels::amx {

// Whether the processor has the tiles and the kernel lets this process use them. KDKERNELS_AMX=0 does without.
inline bool available() {
  static const bool answer = [] {
    const char* wish = std::getenv("KDKERNELS_AMX");
    if (wish && wish[0] == '0') return false;
    constexpr long request_permission = 0x1023, tile_data = 18;
    unsigned eax, ebx, ecx, edx;
    __asm__("cpuid" : "=a"(eax), "=b"(ebx), "=c"(ecx), "=d"(edx) : "a"(7), "c"(0));
    constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
    return (edx & bf16) && (edx & tile) && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return answer;
}

// A tile has 16 lines of A, or 16 columns of B, by 32 values of the summation index.
inline constexpr int64_t kLines = 16, kDepth = 32, kTile = kLines * kDepth;
// A chunk is what one step of the block product reads of A or B: h, m and l of two tiles each.
inline constexpr int64_t kBlock = 2 * kLines, kChunk = 6 * kTile;
inline constexpr int64_t KC = 512, MC = 256, NC = 1024;

struct Split {
  __m512i high, middle, low;  // each lane's upper 16 bits are the bfloat16
};

inline Split split(__m512 value) {
  const __m512i upper = _mm512_set1_epi32(0xffff0000);
  const auto truncated = [&](__m512 x) { return _mm512_and_si512(_mm512_castps_si512(x), upper); };
  const __m512i high = truncated(value);
  const __m512 rest = _mm512_sub_ps(value, _mm512_castsi512_ps(high));
  const __m512i middle = truncated(rest);
  return {high, middle, _mm512_castps_si512(_mm512_sub_ps(rest, _mm512_castsi512_ps(middle)))};
}

// The upper halves of `first` in the lower halves of the result, those of `second` in the upper.
inline __m512i pair(__m512i first, __m512i second) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(first, 16), second);
}

// The upper halves of `first`, then those of `second`.
inline __m512i concatenate(__m512i first, __m512i second) {
  alignas(64) static constexpr int16_t odd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                  33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16(first, _mm512_load_si512(odd), second);
}

// Transpose a tile in units of 32 bits, in place.
inline void transpose(uint16_t* tile) {
  float* words = reinterpret_cast<float*>(tile);
  Vec<float>::type rows[kLines];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLines; ++i) rows[i] = load<float>(words + i * kLines);
  vec_detail::exchange_all<float, 1>(rows);
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLines; ++i) store<float>(words + i * kLines, rows[i]);
}

// Split a block of 16 lines x 32 depths into three tiles, two tiles apart. A's tiles hold a line's 32 depths side by side, B's
// tiles hold pairs of depths of all 16 lines side by side; the one is the other transposed in units of 32 bits.
template <bool by_line>
void pack_tile(const float* source, int64_t line, int64_t depth, float alpha, uint16_t* tiles) {
  const __m512 scale = _mm512_set1_ps(alpha);
  const auto read = [&](const float* from) { return split(_mm512_mul_ps(scale, _mm512_loadu_ps(from))); };
  const auto write = [&](int64_t row, __m512i high, __m512i middle, __m512i low) {
    _mm512_store_si512(tiles + row * kDepth, high);
    _mm512_store_si512(tiles + 2 * kTile + row * kDepth, middle);
    _mm512_store_si512(tiles + 4 * kTile + row * kDepth, low);
  };
  const bool lines_contiguous = line == 1;
  for (int64_t i = 0; i < kLines; ++i) {
    if (lines_contiguous) {
      const Split a = read(source + 2 * i * depth), b = read(source + (2 * i + 1) * depth);
      write(i, pair(a.high, b.high), pair(a.middle, b.middle), pair(a.low, b.low));
    } else {
      const Split a = read(source + i * line), b = read(source + i * line + 16);
      write(i, concatenate(a.high, b.high), concatenate(a.middle, b.middle), concatenate(a.low, b.low));
    }
  }
  if (lines_contiguous == by_line)
    for (int64_t part = 0; part < 3; ++part) transpose(tiles + 2 * part * kTile);
}

// Pack `lines` x `depths` of a matrix whose element (i, k) is source[i * line + k * depth] into blocks of 32 lines, each a row of
// chunks.
template <bool by_line>
void pack(const float* source, int64_t line, int64_t depth, int64_t lines, int64_t depths, float alpha, uint16_t* out) {
  const int64_t blocks = (lines + kBlock - 1) / kBlock, chunks = (depths + kDepth - 1) / kDepth;
  const auto pack_half = [&](int64_t block, int64_t chunk, int64_t half) {
    const int64_t first = block * kBlock + half * kLines, k = chunk * kDepth;
    const int64_t rows = std::clamp<int64_t>(lines - first, 0, kLines), columns = std::min(kDepth, depths - k);
    const float* from = source + first * line + k * depth;
    uint16_t* tiles = out + (block * chunks + chunk) * kChunk + half * kTile;
    if (rows == kLines && columns == kDepth && (line == 1 || depth == 1))
      return pack_tile<by_line>(from, line, depth, alpha, tiles);
    alignas(64) float corner[kTile] = {};
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t q = 0; q < columns; ++q) corner[r * kDepth + q] = from[r * line + q * depth];
    pack_tile<by_line>(corner, kDepth, 1, alpha, tiles);
  };
  // Along the contiguous side of the source.
  if (line == 1)
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t block = 0; block < blocks; ++block) pack_half(block, chunk, 0), pack_half(block, chunk, 1);
  else
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t half = 0; half < 2; ++half)
        for (int64_t chunk = 0; chunk < chunks; ++chunk) pack_half(block, chunk, half);
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The compiler's tile intrinsics do not say that they read and write memory.
inline void settle_memory() { __asm__ volatile("" ::: "memory"); }

// out (32 x 32) = the product of one block of A with one of B over `chunks` steps. Tiles 0-3 sum, 4-5 hold A, 6-7 hold B.
inline void block_product(int64_t chunks, const uint16_t* a, const uint16_t* b, float* out) {
  enum { high, middle, low };
  constexpr int64_t line = 64, row = kBlock * sizeof(float);
  float* below = out + kLines * kBlock;
  const auto load_a = [&](int part) __attribute__((always_inline)) {
    _tile_loadd(4, a + 2 * part * kTile, line);
    _tile_loadd(5, a + (2 * part + 1) * kTile, line);
  };
  const auto load_b = [&](int part) __attribute__((always_inline)) {
    _tile_loadd(6, b + 2 * part * kTile, line);
    _tile_loadd(7, b + (2 * part + 1) * kTile, line);
  };
  const auto multiply = []() __attribute__((always_inline)) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  };
  settle_memory();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t chunk = 0; chunk < chunks; ++chunk, a += kChunk, b += kChunk) {
    // In an order that loads only the middle part of A twice.
    load_b(high), load_a(low), multiply();
    load_a(middle), multiply();
    load_a(high), multiply();
    load_b(low), multiply();
    load_b(middle), multiply();
    load_a(middle), multiply();
  }
  _tile_stored(0, out, row);
  _tile_stored(1, out + kLines, row);
  _tile_stored(2, below, row);
  _tile_stored(3, below + kLines, row);
  settle_memory();
}

// Sums over more than KC are added here rather than in the tiles, which keeps the rounding error that of short sums.
inline void add_block(const float* block, int64_t rows, int64_t columns, float* c, int64_t ldc, bool accumulate) {
  const auto mask = [&](int64_t from) { return __mmask16((1u << std::clamp<int64_t>(columns - from, 0, kLines)) - 1); };
  const __mmask16 masks[2] = {mask(0), mask(kLines)};
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t half = 0; half < 2; ++half) {
      float* out = c + i * ldc + half * kLines;
      __m512 value = _mm512_load_ps(block + i * kBlock + half * kLines);
      if (accumulate) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(masks[half], out));
      _mm512_mask_storeu_ps(out, masks[half], value);
    }
}

// C (m x n) = [C +] alpha * A * B on the calling thread. Blocks below the diagonal, which row 0 meets at column `diagonal`, are
// left alone.
inline void product(int64_t m, int64_t n, int64_t k, View<float> a, View<float> b, float* c, int64_t ldc, float alpha,
                    bool accumulate, int64_t diagonal) {
  const auto packed_size = [](int64_t lines, int64_t depths) {
    return round_up(lines, kBlock) * round_up(depths, kDepth) * 3;
  };
  uint16_t* packed_b = workspace<uint16_t, Scratch::packed_b>(packed_size(std::min(n, NC), std::min(k, KC)));
  uint16_t* packed_a = workspace<uint16_t, Scratch::packed_a>(packed_size(std::min(m, MC), std::min(k, KC)));
  alignas(64) float block[kBlock * kBlock];
  const TileConfig config;
  _tile_loadconfig(&config);
  for (int64_t jc = 0; jc < n; jc += NC) {
    const int64_t nc = std::min(NC, n - jc);
    for (int64_t pc = 0; pc < k; pc += KC) {
      const int64_t kc = std::min(KC, k - pc), chunks = (kc + kDepth - 1) / kDepth;
      pack<false>(b.at(pc, jc), b.col, b.row, nc, kc, alpha, packed_b);
      for (int64_t ic = 0; ic < m; ic += MC) {
        const int64_t mc = std::min(MC, m - ic);
        if (jc + nc <= ic + diagonal) break;
        pack<true>(a.at(ic, pc), a.row, a.col, mc, kc, 1.f, packed_a);
        for (int64_t j = 0; j < nc; j += kBlock)
          for (int64_t i = 0; i < mc; i += kBlock) {
            if (jc + std::min(j + kBlock, nc) <= ic + i + diagonal) break;
            float* out = c + (ic + i) * ldc + jc + j;
            const int64_t rows = std::min(kBlock, mc - i), columns = std::min(kBlock, nc - j);
            block_product(chunks, packed_a + i / kBlock * chunks * kChunk, packed_b + j / kBlock * chunks * kChunk,
                          block);
            add_block(block, rows, columns, out, ldc, accumulate || pc > 0);
          }
      }
    }
  }
  _tile_release();
}

}  // namespace kdkernels::amx

#endif
