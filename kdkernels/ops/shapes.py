"""Shapes, dtypes and memory formats of the results of kernels. Fakes allocate with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of losses and of the gradients that kernels return."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def loss_and_gradients(student: Tensor, teacher: Tensor, grad_student: bool, grad_teacher: bool) -> tuple[Tensor, ...]:
    """Return a scalar loss of two matrices and their gradients. A gradient that is not wanted is empty."""
    dtype = accumulation_dtype(student, teacher)
    grads = (
        student.new_empty(x.shape if wanted else (0,), dtype=dtype)
        for x, wanted in ((student, grad_student), (teacher, grad_teacher))
    )
    return student.new_empty((), dtype=dtype), *grads


def map_shape(features: Tensor) -> tuple[int, int, int, int]:
    """Return channels, height, width, and whether channels are neighbours in memory, for the backward kernels."""
    _, c, h, w = features.shape
    channels_last = features.stride(1) == 1 and c > 1 and h * w > 1
    return c, h, w, 1 if channels_last else 0  # schemas take it among integers, and a symbolic bool is none


def new_maps(rows: Tensor, shape: list[int], k: int) -> Tensor:
    """Return a gradient of maps from the rows of its patches. It is compact, in the memory format of the features."""
    *size, channels_last = shape
    return new_like(rows, (rows.shape[0] // k**2, *size), channels_last)


def new_samples(features: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a compact gradient of features, in channels_last order if every sample has this order."""
    if features.dim() == 4:
        n, c, h, w = features.shape
        if c > 1 and h * w > 1 and features[:1].is_contiguous(memory_format=torch.channels_last):
            return features.new_empty((n, h, w, c), dtype=dtype).permute(0, 3, 1, 2)
    return features.new_empty(features.shape, dtype=dtype)


def new_like(like: Tensor, shape: Sequence[int], channels_last: bool | int, dtype: torch.dtype | None = None) -> Tensor:
    """Return compact maps of a shape, in the given memory format, on the device of ``like``."""
    n, c, h, w = shape
    if channels_last:
        return like.new_empty((n, h, w, c), dtype=dtype).permute(0, 3, 1, 2)
    return like.new_empty((n, c, h, w), dtype=dtype)
