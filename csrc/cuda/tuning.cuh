// What the speed of kernels hangs on, in one place: shapes that are compiled in, and into how many blocks work is cut.
//
// None of it has been measured on a GPU yet. bench/tune.py measures other numbers than those of kTunings beside these.
#pragma once

#include <cstdint>

namespace kdkernels {

// Tiles of products (tile.cuh).
constexpr int kTile = 64;          // rows and columns
constexpr int kDepth = 16;         // depth of a panel, in units: numbers or pairs of them
constexpr int kTileThreads = 128;  // four warps, each with a quarter of the tile, 32 x 32
// Panels of both operands that shared memory holds, and blocks that a multiprocessor has registers for: where it has least shared
// memory, 100 KiB on sm_86 and sm_89, as many find room for their panels.
template <typename T>
inline constexpr int kStages = sizeof(T) == sizeof(float) ? 3 : 2;
template <typename T>
inline constexpr int kTileBlocks = sizeof(T) == sizeof(float) ? 3 : 2;

// Threads of a block, and what they share.
constexpr int kFoldThreads = 256, kFoldEach = 4;      // entries of a product's parts (congruence.cuh)
constexpr int kDiagonalThreads = 128;                 // a row (congruence.cuh)
constexpr int kEmbeddingThreads = 128;                // an embedding (correlation_congruence.cuh)
constexpr int kCentreColumns = 32, kCentreLines = 8;  // columns of embeddings
constexpr int kPatchThreads = 256;                    // a patch, at most, an image's mask, or pixels (patches.cuh)
constexpr int kPixels = 4 * kPatchThreads;            // of an image's maps, to a block
constexpr int kPartEntries = 32, kPartLines = 8;      // entries of a tile's parts (gram.cuh)
constexpr int kMapThreads = 256, kLossThreads = 512;  // a part of a pair of maps; the errors of all (feature_mse.cuh)
constexpr int kNumbers = 16 * kMapThreads;            // of a sample, to a block of the backward kernels
constexpr int kIccThreads = 256;                      // rows of the map, or columns (icc_rows.cuh)
constexpr int kIccSamples = 4;                        // that a thread of the passes by columns works on
constexpr int kReduceThreads = 256;                   // a loss's parts (reduce.cuh)

// Where there are few tiles or samples for the multiprocessors, each is cut into parts: for about so many blocks, none of which has
// less than so much to do.
struct Tuning {
  int64_t capability;                     // of a GPU, times ten, from which on these hold
  int64_t gram_blocks, gram_depth;        // tiles of gram, along their depth
  int64_t product_blocks, product_depth;  // tiles of the feature form's products, along their depth
  int64_t error_blocks, error_numbers;    // pairs of maps of feature_mse
};

inline constexpr Tuning kTunings[] = {
    {80, 384, 256, 256, 256, 2048, 1024},
};

}  // namespace kdkernels
