"""The Triton operators against float64: run on CPU tensors by tests/interpreter and on a GPU by tests/gpu.

A file per operator. A test takes the device it runs on. Sizes are small and odd: one program of a kernel takes the
interpreter milliseconds.
"""

from __future__ import annotations

import torch
from torch import Tensor

ops = torch.ops.kdkernels_triton
FULL_PRECISION = (torch.float32, torch.float64)


def draw(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(device=device, dtype=dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        n, c, h, w = x.shape
        whole = x.new_full((n + 1, c + 2, h + 1, w + 3), float("nan"))
        whole[1:, 1:-1, :-1, 2:-1] = x
        return whole[1:, 1:-1, :-1, 2:-1]
    if layout == "transposed":
        return x.mT.contiguous().mT
    return x
