"""What the speed of Triton's kernels hangs on, in one place: shapes of tiles, and into how many programs work is cut.

One line serves every GPU, and none has been measured yet: ``bench/tune.py`` measures other numbers beside these.
``csrc/cuda/tuning.cuh`` is the same table for CUDA. Nothing is tuned at a user's first call.
"""

from __future__ import annotations

import torch

# congruence: rows, columns and depth of a tile by dtype and tl.dot's input precision.
CONGRUENCE_TILES = {
    (torch.float32, "ieee"): (64, 64, 16),
    (torch.float32, "tf32"): (128, 64, 32),
    (torch.float32, "tf32x3"): (64, 64, 32),
    (torch.float64, "ieee"): (32, 32, 16),
}
# A deep product with few tiles is split along its depth into about this many programs, at least so deep.
CONGRUENCE_PROGRAMS = 256
CONGRUENCE_SPLIT_DEPTH = 256
CONGRUENCE_FOLD_BLOCK = 1024

# gram: rows and columns of a tile, how many products are summed at a time, and warps, by the dtype of the factors.
GRAM_TILES = {
    torch.float32: (64, 16, 8),
    torch.float64: (32, 16, 4),
    torch.bfloat16: (64, 32, 8),
    torch.float16: (64, 32, 8),
}
GRAM_PROGRAMS = 512  # about how many tiles of parts there are, unless the tiles of whole layers are more
GRAM_FOLD = 1024

FEATURE_MSE_BLOCK = 256  # elements of a map that are read at a time
FEATURE_MSE_WARPS = 4
ICC_BLOCK = 32  # rows and columns of a tile of the map
KD_MAX_BLOCK = 4096  # logits of a row at a time
PATCHES_ROW_BLOCK = 4096  # elements of a patch at a time
PATCHES_RESAMPLED_BLOCK = 512  # fewer where each has up to 16 taps
SIMILARITY_PRESERVING_TILE = (16, 128)  # rows and columns that a program reads at a time
