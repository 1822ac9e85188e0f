"""Triton's part of ``library``: float32 numbers as sums of bfloat16 planes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def write_chain(x: Tensor, chain: Tensor) -> None:
    """Write the planes of every row of ``x``, rows x columns, to rows x 7 x width, with zeros beyond the columns."""
    rows, columns = x.shape
    width = chain.shape[2]
    with torch.cuda.device_of(x):
        _chain_kernel[(triton.cdiv(rows * width, BLOCK),)](x, chain, *x.stride(), rows * width, columns, width, BLOCK)


@triton.jit
def planes_of(x):
    """Return three bfloat16 numbers whose sum is x."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def store_planes(pointer, offsets, distance, values, inside, PLANES: tl.constexpr):
    """Store values as planes, ``distance`` apart, or as they are if PLANES is 0."""
    if PLANES == 0:
        tl.store(pointer + offsets, values, mask=inside)
    else:
        high, middle, low = planes_of(values)
        tl.store(pointer + offsets, high, mask=inside)
        tl.store(pointer + offsets + distance, middle, mask=inside)
        if PLANES == 3:
            tl.store(pointer + offsets + 2 * distance, low, mask=inside)


@triton.jit
def _chain_kernel(x_ptr, chain_ptr, row_stride, stride, size, columns, width, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, column = place // width, place % width
    inside = place < size
    x = tl.load(x_ptr + row * row_stride + column * stride, mask=inside & (column < columns), other=0)
    high, middle, low = planes_of(x)
    # The order is library.CHAIN.
    out = chain_ptr + row * 7 * width + column
    tl.store(out, high, mask=inside)
    tl.store(out + width, low, mask=inside)
    tl.store(out + 2 * width, high, mask=inside)
    tl.store(out + 3 * width, middle, mask=inside)
    tl.store(out + 4 * width, middle, mask=inside)
    tl.store(out + 5 * width, high, mask=inside)
    tl.store(out + 6 * width, high, mask=inside)
