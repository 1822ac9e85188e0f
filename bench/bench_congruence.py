"""LKD's loss: ``pytest bench/bench_congruence.py``. The limit is the matrix products of the chosen form."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from measure import AGREEMENT, Case, Work, where_installed
from torch import Tensor

import kdkernels

Stages = tuple[tuple[int, int], ...]  # (channels, side) of the maps, equal for both networks

CIFAR = ((16, 32), (32, 16), (64, 8))


def inputs(n: int, k: int, stages: Stages) -> tuple[list[Tensor], list[Tensor], int]:
    shapes = [(n, c, h, h) for c, h in stages]
    return [torch.randn(s, requires_grad=True) for s in shapes], [torch.randn(s) for s in shapes], k


def fused(student: list[Tensor], teacher: list[Tensor], k: int) -> Tensor:
    return kdkernels.local_correlation_loss(student, teacher, k, partition="resize", reduction="sum")


def textbook(student: Sequence[Tensor], teacher: Sequence[Tensor], k: int) -> Tensor:
    """Return Eqs. 4-6 as the paper states them, summed over stages (Eq. 7)."""
    return sum(_three_relations(unit_patches(s, k), unit_patches(t, k)) for s, t in zip(student, teacher, strict=True))


def full_gram(student: Sequence[Tensor], teacher: Sequence[Tensor], k: int) -> Tensor:
    """Return the sum over all pairs of patches, plus the diagonal: Eqs. 4-6 with equal weights, where Eqs. 4 and 5
    share it.
    """
    loss = 0.0
    for s, t in zip(student, teacher, strict=True):
        x, y = unit_patches(s, k).flatten(0, 1), unit_patches(t, k).flatten(0, 1)
        difference = x @ x.T - y @ y.T
        loss = loss + difference.square().sum() + difference.diagonal().square().sum()
    return loss


def unit_patches(features: Tensor, k: int) -> Tensor:
    """Return n x c x h x w features as n x k² x d vectors of norm 1."""
    n, c, h, w = features.shape
    if h % k or w % k:
        h, w = k * math.ceil(h / k), k * math.ceil(w / k)
        features = F.interpolate(features, size=(h, w), mode="bilinear", align_corners=False)
    cells = features.reshape(n, c, k, h // k, k, w // k).permute(0, 2, 4, 1, 3, 5)
    return F.normalize(cells.reshape(n, k * k, -1), dim=2)


def _three_relations(x: Tensor, y: Tensor) -> Tensor:
    def squared_difference(a: Tensor, b: Tensor) -> Tensor:
        return (a @ a.mT - b @ b.mT).square()

    n, positions, _ = x.shape
    intra = squared_difference(x, y).sum()
    inter_same = squared_difference(x.transpose(0, 1), y.transpose(0, 1)).sum()
    pairs = squared_difference(x.flatten(0, 1), y.flatten(0, 1)).view(n, positions, n, positions)
    other_image = ~torch.eye(n, dtype=torch.bool, device=x.device)[:, None, :, None]
    other_position = ~torch.eye(positions, dtype=torch.bool, device=x.device)[None, :, None, :]
    inter_diff = (pairs * (other_image & other_position)).sum()
    return intra + inter_same + inter_diff


def keops(student: list[Tensor], teacher: list[Tensor], k: int) -> Tensor:
    """Return ``full_gram``, streamed over all pairs. The diagonal is 0, because no random patch has norm 0."""
    from pykeops.torch import LazyTensor

    loss = 0.0
    for s, t in zip(student, teacher, strict=True):
        x, y = unit_patches(s, k).flatten(0, 1), unit_patches(t, k).flatten(0, 1)
        of_student, of_teacher = (LazyTensor(z[:, None]) | LazyTensor(z[None]) for z in (x, y))
        loss = loss + (of_student - of_teacher).square().sum(1).sum()
    return loss


BASELINES = {"textbook": textbook, "full Gram": full_gram}


def work(student: list[Tensor], teacher: list[Tensor], k: int) -> Work:
    """Return the products of the loss and the student's gradient. A symmetric product counts half."""
    stages = kdkernels.explain("local_correlation_loss", student, teacher, k, partition="resize").stages
    return Work(multiply_adds=sum(part.count * part.costs[part.form] for sums in stages for part in sums))


def case(n: int, k: int, *stages: tuple[int, int], headline: bool = False) -> Case:
    loss = f"LKD {' '.join(f'{c}x{h}x{h}' for c, h in stages)} k={k}"
    agreement = AGREEMENT if n * k > 1 else math.inf  # the gradient of a single patch is only rounding
    return Case(loss, n, inputs, (n, k, stages), fused, BASELINES, work, where_installed(keops), headline, agreement)


PAPER = (
    case(64, 4, *CIFAR, headline=True),
    case(256, 4, (64, 8), headline=True),
    case(512, 4, (64, 8), headline=True),
)
CASES = (
    *PAPER,
    *(case(n, 4, (64, 8)) for n in (8, 64)),
    *(case(n, 4, (16, 32)) for n in (8, 64, 256)),
    *(case(n, 2, (256, 8)) for n in (8, 64, 256)),
    *(case(n, 3, (512, 7)) for n in (8, 64)),
)


GRID = tuple(
    case(n, k, stage)
    for stage in ((16, 32), (64, 8), (256, 8), (512, 7))
    for k in (1, 2, 4)
    for n in (1, 8, 64, 256, 512)
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_local_correlation(compare, case):
    compare(case)


@pytest.mark.parametrize("case", GRID, ids=str)
def test_grid(compare, case):
    compare(case, memory=False)
