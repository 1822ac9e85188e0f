"""LKD's loss: ``pytest bench/bench_local_correlation.py``. The limit is the products of the form that is chosen."""

from __future__ import annotations

import pytest
import torch
from measure import Case, Work, where_installed
from textbook import full_gram, textbook, unit_patches
from torch import Tensor

import kdkernels

Stages = tuple[tuple[int, int], ...]  # channels and side of the maps, the same for both networks

CIFAR = ((16, 32), (32, 16), (64, 8))
BASELINES = {"textbook": textbook, "full Gram": full_gram}


def inputs(n: int, k: int, stages: Stages) -> tuple[list[Tensor], list[Tensor], int]:
    shapes = [(n, c, h, h) for c, h in stages]
    return [torch.randn(s, requires_grad=True) for s in shapes], [torch.randn(s) for s in shapes], k


def fused(student: list[Tensor], teacher: list[Tensor], k: int) -> Tensor:
    return kdkernels.local_correlation_loss(student, teacher, k, partition="resize")


def keops(student: list[Tensor], teacher: list[Tensor], k: int) -> Tensor:
    """``full_gram`` streamed over all pairs. Its diagonal is zero: no patch of random features is dead."""
    from pykeops.torch import LazyTensor

    loss = 0.0
    for s, t in zip(student, teacher, strict=True):
        x, y = unit_patches(s, k).flatten(0, 1), unit_patches(t, k).flatten(0, 1)
        of_student, of_teacher = (LazyTensor(z[:, None]) | LazyTensor(z[None]) for z in (x, y))
        loss = loss + (of_student - of_teacher).square().sum(1).sum()
    return loss


def work(student: list[Tensor], teacher: list[Tensor], k: int) -> Work:
    """Products of loss and student's gradient, symmetric ones counted by halves."""
    stages = kdkernels.explain("local_correlation_loss", student, teacher, k, partition="resize").stages
    return Work(multiply_adds=sum(part.count * part.costs[part.form] for sums in stages for part in sums))


def case(n: int, k: int, *stages: tuple[int, int], headline: bool = False) -> Case:
    loss = f"LKD {' '.join(f'{c}x{h}x{h}' for c, h in stages)} k={k}"
    return Case(loss, n, inputs, (n, k, stages), fused, BASELINES, work, where_installed(keops), headline)


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


@pytest.mark.parametrize("case", CASES, ids=str)
def test_local_correlation(compare, case):
    compare(case)
