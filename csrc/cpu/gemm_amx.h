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
#include <vector>

#include "parallel.h"
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
// MC x KC of A and two panels of B, KC x 32 each, fill half of a second-level cache of 2 MiB.
inline constexpr int64_t KC = 512, MC = 256;
// Blocks of this many multiply-adds are worth another thread, per 32 x 32.
inline constexpr int64_t kGrain = 1 << 8;

inline int64_t blocks_of(int64_t lines) { return (lines + kBlock - 1) / kBlock; }
inline int64_t chunks_of(int64_t depths) { return (depths + kDepth - 1) / kDepth; }

// The length of the fewest equal pieces of at most `limit`.
inline int64_t equal_piece(int64_t size, int64_t limit) {
  const int64_t count = (size + limit - 1) / limit;
  return round_up((size + count - 1) / count, kBlock);
}

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

// Split 16 lines x 32 depths into three tiles, two tiles apart. A's tiles hold its lines' depths side by side, B's the depths'
// lines. The two bfloat16 of a word are of depths 16 apart: any order will do that A and B agree on.
template <bool by_line>
void pack_tile(const float* source, int64_t line, int64_t depth, uint16_t* tiles) {
  alignas(64) float transposed[kTile];
  const float *first = source, *second = source + kLines * depth;
  int64_t step = by_line ? line : depth;
  if ((by_line ? depth : line) != 1) {
    transpose_block<float>(first, by_line ? depth : line, kLines, 1, transposed, kLines);
    transpose_block<float>(second, by_line ? depth : line, kLines, 1, transposed + kTile / 2, kLines);
    first = transposed, second = transposed + kTile / 2, step = kLines;
  }
  for (int64_t i = 0; i < kLines; ++i) {
    const Split a = split(_mm512_loadu_ps(first + i * step)), b = split(_mm512_loadu_ps(second + i * step));
    uint16_t* row = tiles + i * kDepth;
    _mm512_store_si512(row, pair(a.high, b.high));
    _mm512_store_si512(row + 2 * kTile, pair(a.middle, b.middle));
    _mm512_store_si512(row + 4 * kTile, pair(a.low, b.low));
  }
}

// A block of 32 lines being packed into a row of chunks, half a chunk at a time. Its element (i, k) is source[i * line + k * depth];
// beyond `lines` and `depths` it is zero.
template <bool by_line>
class Panel {
 public:
  Panel(const float* source, int64_t line, int64_t depth, int64_t lines, int64_t depths, uint16_t* out)
      : source_(source), line_(line), depth_(depth), lines_(lines), depths_(depths), out_(out) {}

  const uint16_t* data() const { return out_; }

  void finish() {
    while (chunk_ * kDepth < depths_) pack_half();
  }

  // Pack the next half of a chunk, if there is one.
  void pack_half() {
    const int64_t i = half_ * kLines, k = chunk_ * kDepth;
    if (k >= depths_) return;
    const float* from = source_ + i * line_ + k * depth_;
    uint16_t* tiles = out_ + chunk_ * kChunk + half_ * kTile;
    if (lines_ >= i + kLines && depths_ >= k + kDepth && (line_ == 1 || depth_ == 1))
      pack_tile<by_line>(from, line_, depth_, tiles);
    else
      pack_corner(from, lines_ - i, depths_ - k, tiles);
    chunk_ += half_;
    half_ ^= 1;
  }

 private:
  void pack_corner(const float* from, int64_t lines, int64_t depths, uint16_t* tiles) const {
    alignas(64) float corner[kTile] = {};
    for (int64_t i = 0; i < std::min(lines, kLines); ++i)
      for (int64_t k = 0; k < std::min(depths, kDepth); ++k) corner[i * kDepth + k] = from[i * line_ + k * depth_];
    pack_tile<by_line>(corner, kDepth, 1, tiles);
  }

  const float* source_;
  int64_t line_, depth_, lines_, depths_;
  uint16_t* out_;
  int64_t chunk_ = 0, half_ = 0;
};

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The compiler's tile intrinsics do not say that they read and write memory.
inline void settle_memory() { __asm__ volatile("" ::: "memory"); }

// out (32 x 32) = the product of one block of A with one of B over `chunks` steps. Tiles 0-3 sum, 4-5 hold A, 6-7 hold B. Between
// steps comes meanwhile(chunk): the vector units are free while the tiles multiply.
template <typename F>
void block_product(int64_t chunks, const uint16_t* a, const uint16_t* b, float* out, const F& meanwhile) {
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
    settle_memory();
    meanwhile(chunk);
  }
  _tile_stored(0, out, row);
  _tile_stored(1, out + kLines, row);
  _tile_stored(2, below, row);
  _tile_stored(3, below + kLines, row);
  settle_memory();
}

// A block of sums on its way to C. Sums over more than KC are added there rather than in the tiles, which keeps the rounding error
// that of short sums.
struct Finished {
  const float* block = nullptr;
  float* c = nullptr;
  int64_t ldc = 0, rows = 0, columns = 0;
  float alpha = 0;
  bool accumulate = false;

  // C [+]= alpha * the rows from `begin` to `end` of the block.
  void add(int64_t begin, int64_t end) const {
    const auto mask = [&](int64_t from) {
      return __mmask16((1u << std::clamp<int64_t>(columns - from, 0, kLines)) - 1);
    };
    const __mmask16 masks[2] = {mask(0), mask(kLines)};
    const __m512 factor = _mm512_set1_ps(alpha);
    for (int64_t i = begin; i < std::min(end, rows); ++i)
      for (int64_t half = 0; half < 2; ++half) {
        float* out = c + i * ldc + half * kLines;
        const __m512 old = accumulate ? _mm512_maskz_loadu_ps(masks[half], out) : _mm512_setzero_ps();
        const __m512 sums = _mm512_load_ps(block + i * kBlock + half * kLines);
        _mm512_mask_storeu_ps(out, masks[half], _mm512_fmadd_ps(factor, sums, old));
      }
  }
};

inline bool suits(int64_t m, int64_t n, int64_t k) { return std::min({m, n, k}) >= 32 && available(); }

// C (m x n) = [C +] alpha * A * B, shared out over the threads. Blocks below the diagonal, which row 0 meets at column `diagonal`,
// are left alone. A piece of A is packed at a time, and B's panels go past it: while the tiles multiply one block, the vector
// units add the block before to C and pack the next panel.
inline void product(int64_t m, int64_t n, int64_t k, View<float> a, View<float> b, float* c, int64_t ldc, float alpha,
                    bool accumulate, int64_t diagonal) {
  const int64_t height = equal_piece(m, MC), length = equal_piece(k, KC), panel_size = chunks_of(length) * kChunk;
  // Call f(j, blocks) for the blocks one below the other in rows [i, i + height) and 32 columns from j.
  const auto for_each_stack = [&](int64_t i, const auto& f) {
    for (int64_t j = std::max<int64_t>(0, i + diagonal) / kBlock * kBlock; j < n; j += kBlock)
      f(j, blocks_of(std::min({height, m - i, std::min(j + kBlock, n) - i - diagonal})));
  };
  int64_t total = 0;
  for (int64_t i = 0; i < m; i += height) for_each_stack(i, [&](int64_t, int64_t blocks) { total += blocks; });

  parallel_blocks(total, 1, 1 + kGrain / k, [&](int64_t begin, int64_t end) {
    uint16_t* packed_a = workspace<uint16_t, Scratch::packed_a>(height / kBlock * panel_size);
    uint16_t* packed_b = workspace<uint16_t, Scratch::packed_b>(2 * panel_size);
    alignas(64) float sums[2][kBlock * kBlock];
    int64_t turn = 0;
    Finished last;
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
      for (int64_t pc = 0; pc < k; pc += length) {
        const int64_t kc = std::min(length, k - pc), chunks = chunks_of(kc), share = (kBlock + chunks - 1) / chunks;
        for (int64_t i = ic; i < std::min(ic + height, m); i += kBlock)
          Panel<true>(a.at(i, pc), a.row, a.col, m - i, kc, packed_a + (i - ic) / kBlock * panel_size).finish();
        const auto panel_of = [&](size_t s) {
          const int64_t j = s < stacks.size() ? stacks[s].column : n;
          return Panel<false>(b.at(pc, j), b.col, b.row, n - j, j < n ? kc : 0, packed_b + s % 2 * panel_size);
        };
        Panel<false> panel = panel_of(0);
        panel.finish();
        for (size_t s = 0; s < stacks.size(); ++s) {
          const Stack& stack = stacks[s];
          const int64_t blocks = stack.end - stack.begin;
          Panel<false> next = panel_of(s + 1);
          int64_t due = 0;
          for (int64_t block = stack.begin; block < stack.end; ++block, turn ^= 1) {
            block_product(chunks, packed_a + block * panel_size, panel.data(), sums[turn], [&](int64_t chunk) {
              last.add(chunk * share, (chunk + 1) * share);
              for (due += 2; due >= blocks; due -= blocks) next.pack_half();
            });
            const int64_t i = ic + block * kBlock;
            last = {sums[turn],
                    c + i * ldc + stack.column,
                    ldc,
                    std::min(kBlock, m - i),
                    std::min(kBlock, n - stack.column),
                    alpha,
                    accumulate || pc > 0};
          }
          panel = next;
        }
      }
    }
    last.add(0, kBlock);
    _tile_release();
  });
}

}  // namespace kdkernels::amx

#endif
