// Similarity matrices of many layers: products of every pair of samples. The depth of each layer is cut into parts.
#pragma once

#include "elements.cuh"
#include "group.cuh"
#include "tile.cuh"

namespace kdkernels {

// A layer's features as a samples x depth operand. The index k within a sample has three digits, and the last two count
// to `middle_size` and `inner_size`. The strides of the digits give the address.
template <typename E>
struct Features {
  using Number = E;
  const void* data;
  Element type;
  bool vectors;  // contiguous numbers E that can be read 16 bytes at a time
  int depth, middle_size, inner_size;
  int64_t stride, outer, middle, inner;  // between samples, and of the digits

  __device__ int64_t offset(int row, int k) const {
    if (inner_size == depth) return row * stride + k * inner;
    const int rest = k / inner_size;
    return row * stride + rest / middle_size * outer + rest % middle_size * middle + k % inner_size * inner;
  }

  __device__ const E* address(int row, int k) const { return static_cast<const E*>(data) + row * stride + k; }
  __device__ E read(int row, int k) const { return kdkernels::read<E>(data, type, offset(row, k)); }
};

// An entry on the diagonal or right of it, in a symmetric matrix with `rows` rows.
template <typename T>
__device__ void write_mirrored(T* matrix, int rows, int row, int column, T entry) {
  if (row > column || column >= rows) return;
  matrix[int64_t(row) * rows + column] = entry;
  matrix[int64_t(column) * rows + row] = entry;
}

template <typename E>
struct Similarity {
  Features<E> features;
  int parts, part_depth;
  Computed<E>* out;  // the matrix, or the tiles of the parts if there are several
};

// One block per part and tile, from the diagonal on.
template <typename E>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<Computed<E>>)
    similarity_kernel(const __grid_constant__ Group<Similarity<E>> group, int batch, bool tf32) {
  using T = Computed<E>;
  const int index = group.index();
  const Similarity<E>& p = group.problems[index];
  const int across = (batch + kTile - 1) / kTile;
  const int block = group.block(index), in_a_part = int(triangle(across, across));
  const Place place = Place::in_triangle(block % in_a_part, across);
  const int begin = block / in_a_part * p.part_depth;
  const int end = begin + min(p.part_depth, p.features.depth - begin);
  const auto term = [&](int) { return Term<Features<E>>{p.features, p.features, begin, end}; };
  Tile<T> tile =
      multiply_tiles<T, true, true, 1>(term, place.row, batch, place.column, batch, tf32, place.row == place.column);
  T* const out = p.parts == 1 ? p.out : p.out + int64_t(block) * kTile * kTile;
  const bool whole = p.parts == 1;
  tile.for_each([&](int i, int j, T& entry) {
    const int r = tile.row(i), s = tile.column(j);
    if (whole)
      write_mirrored(out, batch, place.row + r, place.column + s, entry);
    else
      out[r * kTile + s] = entry;
  });
}

// The tiles of a matrix's parts, and the matrix.
template <typename T>
struct Parts {
  const T* tiles;
  int64_t count;
  T* matrix;
};

// One block per 32 entries of a tile. Each warp sums every eighth part.
template <typename T>
__global__ void __launch_bounds__(kPartEntries* kPartLines)
    add_parts_kernel(const __grid_constant__ Group<Parts<T>> group, int batch) {
  SHARED_ARRAY(T, sums, kPartEntries * kPartLines);
  const int index = group.index();
  const Parts<T>& p = group.problems[index];
  const int across = (batch + kTile - 1) / kTile;
  const int64_t in_a_part = triangle(across, across), first = int64_t(group.block(index)) * kPartEntries;
  const int lane = int(threadIdx.x) % kPartEntries, line = int(threadIdx.x) / kPartEntries;
  T sum = 0;
#pragma unroll 4
  for (int64_t part = line; part < p.count; part += kPartLines)
    sum += p.tiles[part * in_a_part * kTile * kTile + first + lane];
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (line > 0) return;
  for (int other = 1; other < kPartLines; ++other) sum += sums[other * kPartEntries + lane];
  const Place place = Place::in_triangle(int(first / (kTile * kTile)), across);
  const int entry = int(first % (kTile * kTile)) + lane;
  write_mirrored(p.matrix, batch, place.row + entry / kTile, place.column + entry % kTile, sum);
}

// sums = slopes + slopesᵀ for every matrix. One block per line. The slopes may have any strides.
template <typename T>
__global__ void __launch_bounds__(512)
    add_transposed_kernel(const T* slopes, int64_t matrix, int64_t row, int64_t column, int batch, T* sums) {
  const int64_t i = blockIdx.x % batch;
  slopes += blockIdx.x / batch * matrix;
  for (int64_t j = threadIdx.x; j < batch; j += blockDim.x)
    sums[int64_t(blockIdx.x) * batch + j] = slopes[i * row + j * column] + slopes[j * row + i * column];
}

template <typename E>
struct FeatureGradient {
  Matrix<Computed<E>> sums;
  Features<E> features;
  void* out;  // [batch][depth], in the features' type
};

// One block per tile of S F.
template <typename E>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<Computed<E>>)
    feature_gradient_kernel(const __grid_constant__ Group<FeatureGradient<E>> group, int batch, bool tf32) {
  using T = Computed<E>;
  const int index = group.index();
  const FeatureGradient<E>& p = group.problems[index];
  const int depth = p.features.depth, lines = (batch + kTile - 1) / kTile;
  const int row = group.block(index) % lines * kTile, column = group.block(index) / lines * kTile;
  const auto term = [&](int) { return Term<Matrix<T>, Features<E>>{p.sums, p.features, 0, batch}; };
  Tile<T> tile = multiply_tiles<T, true, false, 1>(term, row, batch, column, depth, tf32);
  with_type(p.features.type, [&](auto type) {
    using Out = decltype(type);
    Out* const out = static_cast<Out*>(p.out);
    tile.for_each([&](int i, int j, T& entry) {
      const int r = row + tile.row(i), s = column + tile.column(j);
      if (r < batch && s < depth) out[int64_t(r) * depth + s] = number<Out>(entry);
    });
  });
}

}  // namespace kdkernels
