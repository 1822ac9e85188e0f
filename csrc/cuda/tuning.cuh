// The numbers that determine the speed of the kernels: shapes that are compiled in, and the number of blocks.
//
// None of them has been measured on a GPU yet. bench/tune.py compares the numbers of kTunings with others.
#pragma once

#include <cstdint>

namespace kdkernels {

// Tiles of products (tile.cuh).
constexpr int kTile = 64;   // rows and columns
constexpr int kDepth = 32;  // depth of a panel
template <typename P>
inline constexpr int kUnsplitDepth = sizeof(P) == 2 ? 128 : 16;  // of a panel whose numbers are multiplied as they are
constexpr int kTileThreads = 128;                                // four warps, each with a quarter of the tile, 32 x 32
// Blocks per multiprocessor, for which there are registers.
template <typename T>
inline constexpr int kTileBlocks = sizeof(T) == sizeof(float) ? 3 : 2;

// Threads of a block, and what they work on.
constexpr int kFoldThreads = 256, kFoldEach = 4;      // entries of a product's parts (congruence.cuh)
constexpr int kDiagonalThreads = 128;                 // a row (congruence.cuh)
constexpr int kEmbeddingThreads = 128;                // an embedding (correlation_congruence.cuh)
constexpr int kCentreColumns = 32, kCentreLines = 8;  // columns of embeddings
constexpr int kPatchThreads = 256;                    // at most a patch, an image's mask, or pixels (patches.cuh)
constexpr int kPixels = 4 * kPatchThreads;            // pixels of an image's maps per block
constexpr int kPartEntries = 32, kPartLines = 8;      // entries of a tile's parts (gram.cuh)
constexpr int kMapThreads = 256, kLossThreads = 512;  // a part of a pair of maps; the errors of all (feature_mse.cuh)
constexpr int kNumbers = 16 * kMapThreads;            // numbers of a sample per block, backward
constexpr int kIccThreads = 256;                      // rows of the map, or columns (icc_rows.cuh)
constexpr int kIccSamples = 4;                        // samples per thread in the passes by columns
constexpr int kReduceThreads = 256;                   // a loss's parts (reduce.cuh)

// If there are few tiles or samples for the multiprocessors, each is cut into parts. There are about as many blocks as
// the first number, and no block has less work than the second number.
struct Tuning {
  int64_t capability;                     // compute capability times ten, from which on these numbers hold
  int64_t gram_blocks, gram_depth;        // tiles of gram, along their depth
  int64_t product_blocks, product_depth;  // tiles of the feature form's products, along their depth
  int64_t error_blocks, error_numbers;    // pairs of maps of feature_mse
};

inline constexpr Tuning kTunings[] = {
    {80, 384, 256, 256, 256, 2048, 1024},
};

}  // namespace kdkernels
