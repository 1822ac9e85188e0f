// Matrix products in tiles of 64 x 64, one block per tile, on tensor cores. Two operands of the same half precision are
// multiplied as they are, which is exact. Other operands are split into planes of bfloat16, and a number is the sum of its
// planes. A number is split once, on its way to shared memory. Six products of a float's three planes keep its accuracy.
#pragma once

#include <type_traits>

#include "elements.cuh"
#include "tuning.cuh"

namespace kdkernels {

constexpr int kLines = 2, kColumns = 4;  // blocks of 16 x 8 in a quarter

// What tensor cores multiply, if the operands have numbers A and B.
template <typename A, typename B>
using Plane = std::conditional_t<std::is_same_v<A, double> || (std::is_same_v<A, B> && kIsHalf<A>), A, BFloat16>;

// The planes of a number E. The 11 bits of a Half fill two.
template <typename E, typename P>
inline constexpr int kPlanes = std::is_same_v<E, P>      ? 1
                               : std::is_same_v<E, Half> ? 2
                                                         : 3;

// Numbers in lines that are `stride` apart. The numbers of a line are neighbours.
template <typename T>
struct Matrix {
  using Number = T;
  const T* data;
  int64_t stride;
  bool vectors;  // pointers, strides and sizes are multiples of 16 bytes, and 64 strides fit in 32 bits

  __host__ __device__ Matrix from(int64_t offset) const { return {data + offset, stride, vectors}; }
  __device__ const T* address(int line, int column) const { return data + line * stride + column; }
  __device__ T read(int line, int column) const { return *address(line, column); }
};

// Whether 64 strides fit in 32 bits.
inline bool is_short(int64_t stride) { return stride < int64_t(1) << 25; }

// Split a number: each plane is the bfloat16 that is nearest to what the planes before have left. The rest is exact.
template <typename E, typename P, int Planes>
__device__ void split(E whole, P (&planes)[Planes]) {
  if constexpr (std::is_same_v<E, P>) {
    planes[0] = whole;
  } else {
    float rest = number<float>(whole);
    for (P& plane : planes) {
      plane = P(rest);
      rest -= float(plane);
    }
  }
}

// 16 bytes of neighbours.
struct alignas(16) Piece {
  unsigned words[4];
};

// The numbers of a piece in planes, each with `Words` words.
template <typename E, typename P, int Planes, int Words>
__device__ void split(const Piece& piece, unsigned (&planes)[Planes][Words]) {
#pragma unroll
  for (int word = 0; word < Words; ++word)
    if constexpr (std::is_same_v<E, P>) {
      planes[0][word] = piece.words[word];
    } else {
      float low, high;
      if constexpr (kIsHalf<E>) {
        const auto pair = reinterpret_cast<const HalfPair<E>&>(piece.words[word]);
        low = float(pair.numbers[0]), high = float(pair.numbers[1]);
      } else {
        low = __uint_as_float(piece.words[2 * word]), high = __uint_as_float(piece.words[2 * word + 1]);
      }
#pragma unroll
      for (int plane = 0; plane < Planes; ++plane) {
        planes[plane][word] = bfloat16_pair(low, high);
        low -= __uint_as_float(planes[plane][word] << 16);
        high -= __uint_as_float(planes[plane][word] & 0xffff0000u);
      }
    }
}

// The part of an operand that a tile needs: `rows` rows from `row` on, at the depths from begin to end.
template <typename Source>
struct Area {
  Source source;
  int row, rows, begin, end;
};
template <typename Source>
Area(Source, int, int, int, int) -> Area<Source>;

// A panel of one operand, 64 x Depth, with numbers E in planes P. Neighbours in memory are also neighbours in shared
// memory, along the depth or across it. Lines in shared memory are padded, so that eight lines lie in different banks.
template <typename E, typename P, bool Along, int Depth>
struct Panel {
  static constexpr int kCount = kPlanes<E, P>, kTogether = 16 / int(sizeof(E));
  static constexpr int kLength = Along ? Depth : kTile, kHeight = Along ? kTile : Depth;
  static constexpr int kPitch = kLength + (sizeof(P) == 2 ? 8 : 4);
  static constexpr int kSize = kHeight * kPitch;  // of a plane
  // Threads read pieces: all pieces of some lines in each step.
  static constexpr int kPieces = kLength / kTogether, kApart = kTileThreads / kPieces, kSteps = kHeight / kApart;
  static_assert(kPieces * kTogether == kLength && kApart * kPieces == kTileThreads && kSteps * kApart == kHeight);

  static __device__ int my_line() { return int(threadIdx.x) / kPieces; }
  static __device__ int my_column() { return int(threadIdx.x) % kPieces * kTogether; }

  // Visits this thread's pieces of one panel after the other.
  template <typename Source>
  class Pieces {
   public:
    __device__ explicit Pieces(const Area<Source>& area)
        : from_(area.source.address(Along ? area.row + my_line() : area.begin + my_line(),
                                    Along ? area.begin + my_column() : area.row + my_column())),
          apart_(kApart * int(area.source.stride)),
          depths_(area.end - area.begin - (Along ? my_column() : my_line())),
          rows_(area.rows - area.row - (Along ? my_line() : my_column())) {}

    // Call f(step, piece, valid). Pieces outside of the area are not valid, and count as zeros.
    template <typename F>
    __device__ void next_panel(const F& f) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
        f(step, reinterpret_cast<const Piece*>(from_ + step * apart_),
          (Along ? depths_ : rows_) > 0 && (Along ? rows_ : depths_) > step * kApart);
      from_ += Along ? Depth : int64_t(kSteps) * apart_;
      depths_ -= Depth;
    }

   private:
    const E* from_;
    int apart_;
    int depths_, rows_;
  };

  // The place of this thread's piece in shared memory.
  static __device__ P* place(P* shared, int step) {
    return shared + (my_line() + step * kApart) * kPitch + my_column();
  }

  template <typename Source>
  static __device__ void begin_copy(Pieces<Source>& pieces, P* shared) {
    pieces.next_panel([&](int step, const Piece* from, bool valid) { copy_async(place(shared, step), from, valid); });
  }

  template <typename Source>
  static __device__ void read(Pieces<Source>& pieces, Piece (&results)[kSteps]) {
    pieces.next_panel([&](int step, const Piece* from, bool valid) {
      results[step] = {};
      if (valid) results[step] = *from;
    });
  }

  static __device__ void write(const Piece (&pieces)[kSteps], P* shared) {
    constexpr int count = 4 * int(sizeof(P)) / int(sizeof(E));
    struct alignas(4 * count) Words {
      unsigned words[count];
    };
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      unsigned planes[kCount][count];
      split<E, P>(pieces[step], planes);
#pragma unroll
      for (int plane = 0; plane < kCount; ++plane)
        *reinterpret_cast<Words*>(place(shared, step) + plane * kSize) = reinterpret_cast<const Words&>(planes[plane]);
    }
  }

  // Read and write number by number, for other alignments and strides.
  template <typename Source>
  static __device__ void copy(const Area<Source>& area, int panel, P* shared) {
    const int first = area.begin + panel * Depth;
#pragma unroll 2  // more would need more registers
    for (int i = int(threadIdx.x); i < kHeight * kLength; i += kTileThreads) {
      const int row = area.row + (Along ? i / kLength : i % kLength), k = first + (Along ? i % kLength : i / kLength);
      const bool valid = row < area.rows && k < area.end;
      P planes[kCount];
      split(valid ? area.source.read(Along ? row : k, Along ? k : row) : E(0), planes);
      for (int plane = 0; plane < kCount; ++plane)
        shared[plane * kSize + i / kLength * kPitch + i % kLength] = planes[plane];
    }
  }

  static __device__ const P* at(const P* shared, int row, int k) {
    return shared + (Along ? row * kPitch + k : k * kPitch + row);
  }

  // The fragment of 16 rows and 16 depths of the left operand: rows 0 to 7 and 8 to 15 with the first eight depths, and
  // with the last eight.
  static __device__ void read_left(const P* shared, int row, int k, HalfPair<P> (&fragment)[4]) {
    const int lane = int(threadIdx.x) % kWarp, line = lane % 8, second = lane / 8 % 2 * 8, last = lane / 16 * 8;
    const P* const from = Along ? at(shared, row + second + line, k + last) : at(shared, row + second, k + last + line);
    read_matrices<!Along>(fragment, from);
  }

  // Two fragments of 8 rows and 16 depths of the right operand, each with the first eight depths and the last eight.
  static __device__ void read_right(const P* shared, int row, int k, HalfPair<P> (&one)[2], HalfPair<P> (&other)[2]) {
    const int lane = int(threadIdx.x) % kWarp, line = lane % 8, last = lane / 8 % 2 * 8, second = lane / 16 * 8;
    const P* const from = Along ? at(shared, row + second + line, k + last) : at(shared, row + second, k + last + line);
    HalfPair<P> both[4];
    read_matrices<!Along>(both, from);
    one[0] = both[0], one[1] = both[1], other[0] = both[2], other[1] = both[3];
  }
};

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

// Panels of both operands in shared memory. While one pair is multiplied, the next one comes: into shared memory if the
// numbers are multiplied as they are, and into registers if they will be split.
template <bool AlongA, bool AlongB, typename NumberA, typename NumberB>
struct Panels {
  using P = Plane<NumberA, NumberB>;
  static constexpr bool kSplit = !std::is_same_v<P, NumberA> || !std::is_same_v<P, NumberB>;
  static constexpr int kDeep = kSplit ? kDepth : kUnsplitDepth<P>, kStages = kSplit ? 1 : 2;
  using A = Panel<NumberA, P, AlongA, kDeep>;
  using B = Panel<NumberB, P, AlongB, kDeep>;
  static constexpr int kSize = A::kCount * A::kSize + B::kCount * B::kSize;  // in numbers P
  static constexpr int kBytes = kStages * kSize * int(sizeof(P));

  // entries += a b. The sum of a panel is added with rounding, because the additions of tensor cores truncate.
  static __device__ void multiply(float (&entries)[kLines][kColumns][4], const P* a, const P* b, int row, int column,
                                  bool tf32) {
    float sums[kLines][kColumns][4] = {};
#pragma unroll
    for (int k = 0; k < kDeep; k += 16) {
      HalfPair<P> right[B::kCount][kColumns][2];
#pragma unroll
      for (int plane = 0; plane < B::kCount; ++plane)
#pragma unroll
        for (int j = 0; j < kColumns; j += 2)
          B::read_right(b + plane * B::kSize, column + 8 * j, k, right[plane][j], right[plane][j + 1]);
      const auto add = [&](int of_a, std::initializer_list<int> of_b) {
        if (of_a >= A::kCount || (of_a == 2 && tf32)) return;
        HalfPair<P> left[kLines][4];
#pragma unroll
        for (int i = 0; i < kLines; ++i) A::read_left(a + of_a * A::kSize, row + 16 * i, k, left[i]);
        for (const int plane : of_b)
          if (plane < B::kCount && !(of_a + plane == 2 && tf32)) kdkernels::multiply(sums, left, right[plane]);
      };
      // The products of the largest planes come last, so that little is truncated. `tf32` leaves out the products that
      // are 2^-16 of them. The first one is never left out, so that the compiler knows that it is added to 0.
      add(1, {0, 1});
      add(2, {0});
      add(0, {2, 1, 0});
    }
#pragma unroll
    for (int i = 0; i < kLines; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) entries[i][j][e] += sums[i][j][e];
  }

  static __device__ void multiply(double (&entries)[kLines][kColumns][4], const double* a, const double* b, int row,
                                  int column, bool) {
    const int lane = int(threadIdx.x) % kWarp, line = lane / 4, depth = lane % 4;
#pragma unroll
    for (int k = 0; k < kDeep; k += 8) {
      double left[kLines][4], right[kColumns][2];
#pragma unroll
      for (int i = 0; i < kLines; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) left[i][e] = *A::at(a, row + line + 16 * i + e % 2 * 8, k + depth + e / 2 * 4);
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) right[j][e] = *B::at(b, column + line + 8 * j, k + depth + e * 4);
      kdkernels::multiply(entries, left, right);
    }
  }
};
template <typename T, bool AlongA, bool AlongB, typename A = T, typename B = A>
inline constexpr int kTileBytes = Panels<AlongA, AlongB, A, B>::kBytes;

template <typename T>
__device__ void negate(Tile<T>& tile) {
  tile.for_each([](int, int, T& entry) { entry = -entry; });
}

// Add a product to the tile. Vectors: both operands can be read 16 bytes at a time. `mirrored`: they have the same panel.
template <bool AlongA, bool AlongB, bool Vectors, typename T, typename SourceA, typename SourceB>
__device__ void add_product(Tile<T>& tile, const Area<SourceA>& a, const Area<SourceB>& b, bool tf32, bool mirrored) {
  using Both = Panels<AlongA, AlongB, typename SourceA::Number, typename SourceB::Number>;
  using A = typename Both::A;
  using B = typename Both::B;
  using P = typename Both::P;
  const auto left_at = [](int panel) {
    return reinterpret_cast<P*>(dynamic_shared_memory()) + panel % Both::kStages * Both::kSize;
  };
  const auto right_at = [&](int panel) { return left_at(panel) + (mirrored ? 0 : A::kCount * A::kSize); };
  const int warp = int(threadIdx.x) / kWarp, row = warp / 2 * 32, column = warp % 2 * 32;
  const int count = (a.end - a.begin + Both::kDeep - 1) / Both::kDeep;
  typename A::template Pieces<SourceA> a_pieces(a);
  typename B::template Pieces<SourceB> b_pieces(b);
  Piece of_a[A::kSteps], of_b[B::kSteps];
  const auto copy = [&](int panel) {
    if constexpr (Vectors && !Both::kSplit) {
      if (panel < count) {
        A::begin_copy(a_pieces, left_at(panel));
        if (!mirrored) B::begin_copy(b_pieces, right_at(panel));
      }
      close_copies();
    }
  };
  const auto read = [&] {
    if constexpr (Vectors && Both::kSplit) {
      A::read(a_pieces, of_a);
      if (!mirrored) B::read(b_pieces, of_b);
    }
  };
  copy(0);
  read();
#pragma unroll 1
  for (int panel = 0; panel < count; ++panel) {
    P *const left = left_at(panel), *const right = right_at(panel);
    copy(panel + 1);
    if constexpr (!Vectors) {
      A::copy(a, panel, left);
      if (!mirrored) B::copy(b, panel, right);
    } else if constexpr (Both::kSplit) {
      A::write(of_a, left);
      if (!mirrored) B::write(of_b, right);
    } else {
      wait_copies<1>();
    }
    __syncthreads();
    read();
    Both::multiply(tile.entries, left, right, row, column, tf32);
    __syncthreads();
  }
}

// The tile at (row, column) of a b for term(0), or of the difference of both products for term(0) and term(1). It has
// `rows` rows and `columns` columns. Registers have no room for two terms, so each is asked for when it is due. `tf32`:
// the numbers may be rounded to tf32. `mirrored`: a equals b, and row equals column, so one panel serves both.
template <typename T, bool AlongA, bool AlongB, int Terms, typename F>
__device__ Tile<T> multiply_tiles(const F& term, int row, int rows, int column, int columns, bool tf32 = false,
                                  bool mirrored = false) {
  Tile<T> tile;
#pragma unroll 1
  for (int i = 0; i < Terms; ++i) {
    const auto now = term(i);
    if (now.begin >= now.end) continue;
    const Area a{now.a, row, rows, now.begin, now.end};
    const Area b{now.b, column, columns, now.begin, now.end};
    if (i > 0) negate(tile);
    if (now.a.vectors && now.b.vectors)
      add_product<AlongA, AlongB, true>(tile, a, b, tf32, mirrored);
    else
      add_product<AlongA, AlongB, false>(tile, a, b, tf32, mirrored);
    if (i > 0) negate(tile);
  }
  return tile;
}

}  // namespace kdkernels
