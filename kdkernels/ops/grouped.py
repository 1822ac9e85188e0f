"""Shared by Triton kernels that serve many tensors in one launch. A program selects its tensor from tuples."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def number(options, index, COUNT: tl.constexpr):
    """Return options[index] of a tuple of integers."""
    chosen = tl.full((), 0, tl.int64)
    for i in tl.static_range(COUNT):
        chosen = tl.where(index == i, tl.full((), options[i], tl.int64), chosen)
    return chosen


@triton.jit
def pointer(options, index, COUNT: tl.constexpr):
    """Return options[index] of a tuple of pointers."""
    chosen = options[0]
    for i in tl.static_range(1, COUNT):
        chosen = tl.where(index == i, options[i], chosen)
    return chosen
