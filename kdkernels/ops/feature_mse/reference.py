"""Weighted mean squared errors of pairs of maps in plain PyTorch: the specification of ``feature_mse``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..shapes import accumulation_dtype


def feature_mse(projected: Sequence[Tensor], targets: Sequence[Tensor], weights: Tensor, scale: float) -> Tensor:
    """``scale · Σ weights ∘ errors`` over samples and pairs (SemCKD Eq. 7)."""
    dtype = accumulation_dtype(*projected, *targets)
    errors = torch.stack([sample_mse(p.to(dtype), t.to(dtype)) for p, t in zip(projected, targets, strict=True)], 1)
    return scale * (weights.flatten(1).to(dtype) * errors).sum()


def sample_mse(projected: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of each sample. The larger map is averaged down to the smaller."""
    size = smaller_size(projected, target)
    return (_pooled(projected, size) - _pooled(target, size)).square().flatten(1).mean(1)


def smaller_size(projected: Tensor, target: Tensor) -> tuple[int, int]:
    """Return the height and width in which two maps are compared."""
    return min(projected.shape[2], target.shape[2]), min(projected.shape[3], target.shape[3])


def _pooled(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return maps if maps.shape[2:] == size else F.adaptive_avg_pool2d(maps, size)
