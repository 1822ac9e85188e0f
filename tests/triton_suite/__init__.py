"""The Triton operators against float64. tests/interpreter runs them on CPU tensors, tests/gpu on a GPU.

There is a file per operator. A test takes the device it runs on. Sizes are small and odd, because the interpreter needs
milliseconds per program of a kernel.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

ops = torch.ops.kdkernels_triton
FULL_PRECISION = (torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow))


def draw(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(device=device, dtype=dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Return the same values with other strides."""
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
