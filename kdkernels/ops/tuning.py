"""The numbers that determine the speed of the Triton kernels and of the library's products.

One line serves every GPU. None has been measured yet. ``bench/tune.py`` compares them with other numbers.
``csrc/cuda/tuning.cuh`` is the same table for CUDA. A user's first call tunes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


def block_of_classes(classes: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the classes of a block, and the warps that share it. float64 takes more registers."""
    double = dtype == torch.float64
    block = min(1 << (classes - 1).bit_length(), KD_MAX_BLOCK // 4 if double else KD_MAX_BLOCK)
    return {"BLOCK": block, "num_warps": max(1, min(block // (128 if double else 256), 8))}


class Large(NamedTuple):
    """The sizes from which "auto" takes the library's products on a GPU: rows, and the columns of both networks."""

    rows: int
    columns: int


# Not measured. By bench/predict.py, the library is faster from about 1,800 rows of 512 columns on. The prediction knows
# no gaps between launches, so the number here is larger. With fewer columns, the passes over a strip cost too much.
LARGE_GRAM = Large(2560, 512)
# SP has no CUDA kernels. Triton's are slower than cuBLAS as soon as there are tiles for every multiprocessor.
LARGE_SIMILARITY = Large(1024, 512)
# Numbers of a strip: 16 MiB in float32. With the slopes in planes it stays in the 50 MiB of an H100's L2 cache.
LIBRARY_STRIP = 2**22
LIBRARY_TILE = (4, 1024)  # rows and columns of a strip per program of the fused kernel

# congruence: rows, columns and depth of a tile, by dtype and input precision of tl.dot.
CONGRUENCE_TILES = {
    (torch.float32, "ieee"): (64, 64, 16),
    (torch.float32, "tf32"): (128, 64, 32),
    (torch.float32, "tf32x3"): (64, 64, 32),
    (torch.float64, "ieee"): (32, 32, 16),
}
# A deep product with few tiles is split along its depth into about this many programs. Each has at least this depth.
CONGRUENCE_PROGRAMS = 256
CONGRUENCE_SPLIT_DEPTH = 256
CONGRUENCE_FOLD_BLOCK = 1024

# gram: rows and columns of a tile, products per step, and warps, by the dtype of the factors.
GRAM_TILES = {
    torch.float32: (64, 16, 8),
    torch.float64: (32, 16, 4),
    torch.bfloat16: (64, 32, 8),
    torch.float16: (64, 32, 8),
}
GRAM_PROGRAMS = 512  # about the number of tiles of all parts, or more if the layers have more tiles
GRAM_FOLD = 1024

DIST_ROWS, DIST_COLUMNS = 32, 32  # rows and columns of a tile of the pass by columns
FEATURE_MSE_BLOCK = 256  # elements of a map per step
FEATURE_MSE_WARPS = 4
ICC_BLOCK = 32  # rows and columns of a tile of the map
KD_MAX_BLOCK = 4096  # logits of a row per step
PATCHES_ROW_BLOCK = 4096  # elements of a patch per step
PATCHES_RESAMPLED_BLOCK = 512  # fewer, because each element reads up to 16 pixels
RKD_TILE, RKD_COLUMNS = 16, 8  # rows and columns of a tile of pairs; columns of both rows per step
SIMILARITY_PRESERVING_TILE = (16, 128)  # rows and columns per step of a program

# token_relation: rows, columns and depth of a tile, and warps, by the compute type. bfloat16 stands for rows of both
# networks in half precision. Larger tiles spill registers where both gradients are computed, on AMD's GPUs earlier.
TOKEN_RELATION_TILES = {
    torch.float32: (64, 32, 16, 8),
    torch.float64: (32, 16, 16, 4),
    torch.bfloat16: (64, 32, 32, 8),
}
TOKEN_RELATION_TILES_AMD = TOKEN_RELATION_TILES | dict.fromkeys((torch.float32, torch.bfloat16), (64, 16, 16, 8))
