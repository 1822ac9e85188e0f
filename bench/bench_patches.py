"""LKD with class-aware attention: masked and cropped maps. ``pytest bench/bench_patches.py``.

The limit has only the matrix products. The rest of the time is the cost of masking, cropping and splitting.
"""

from __future__ import annotations

import bench_congruence
import pytest
import torch
from measure import Case, Work
from torch import Tensor

import kdkernels

K, THRESHOLD = 4, 0.5


def inputs(n: int, channels: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the maps, and attention that exceeds the threshold in a different box per image."""
    shape = n, channels, side, side
    start, size = torch.randint(0, side // 2, (2, n, 1)), torch.randint(side // 4, side // 2, (2, n, 1))
    rows, columns = (torch.arange(side) >= start) & (torch.arange(side) < start + size)
    mask = torch.where(rows[:, :, None] & columns[:, None], 0.6, 0.2) + 0.1 * torch.rand(n, side, side)
    return torch.randn(shape, requires_grad=True), torch.randn(shape), mask


def fused(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    return kdkernels.local_correlation_loss(student, teacher, K, mask=mask, threshold=THRESHOLD, reduction="sum")


def textbook(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    vertical, horizontal = (resampling((mask > THRESHOLD).any(dim)) for dim in (2, 1))
    maps = [vertical @ (mask[:, None] * features) @ horizontal.mT for features in (student, teacher)]
    return bench_congruence.full_gram(maps[:1], maps[1:], K)


def resampling(inside: Tensor) -> Tensor:
    """Return per image the matrix that resamples bilinearly between its first and its last pixel inside the box."""
    side = inside.shape[1]
    index = torch.arange(side, device=inside.device)
    first = torch.where(inside, index, side).amin(1)[:, None]
    last = torch.where(inside, index, -1).amax(1)[:, None]
    place = (index + 0.5) * (last - first + 1) / side - 0.5 + first
    place = torch.minimum(torch.maximum(place, first), last)
    return (1 - (place[:, :, None] - index).abs()).clamp(min=0)[:, None]


def work(student: Tensor, teacher: Tensor, mask: Tensor) -> Work:
    return bench_congruence.work([student], [teacher], K)


def case(n: int, channels: int, side: int, headline: bool = False) -> Case:
    loss, arguments = f"LKD attention {channels}x{side}x{side} k={K}", (n, channels, side)
    return Case(loss, n, inputs, arguments, fused, {"textbook": textbook}, work, headline=headline)


CASES = (case(64, 64, 8, headline=True), case(16, 64, 8), case(256, 64, 8), case(64, 16, 32))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_patches(compare, case):
    compare(case)
