"""CCKD's loss: ``pytest bench/bench_correlation_congruence.py``.

The limit is the products of two symmetric Gram matrices and of one gradient. Of the bilinear kernel it is the products
of the form that is used: with many samples, they are of sums over features.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from measure import Case, Work, where_installed
from torch import Tensor

import kdkernels

GAMMA, ORDER = 0.4, 2
TAYLOR = [math.exp(-2 * GAMMA) * (2 * GAMMA) ** p / math.factorial(p) for p in range(ORDER + 1)]


def inputs(batch: int, width: int, kernel: str) -> tuple[Tensor, Tensor, str]:
    return torch.randn(batch, width, requires_grad=True), torch.randn(batch, width), kernel


def fused(student: Tensor, teacher: Tensor, kernel: str) -> Tensor:
    return kdkernels.correlation_congruence_loss(student, teacher, kernel=kernel, gamma=GAMMA, order=ORDER)


def textbook(student: Tensor, teacher: Tensor, kernel: str) -> Tensor:
    """Return Eq. 6 as one would write it: both kernel matrices, and the mean of their squared difference."""
    return F.mse_loss(matrix(F.normalize(student), kernel), matrix(F.normalize(teacher), kernel))


def matrix(x: Tensor, kernel: str) -> Tensor:
    if kernel == "mmd":
        means = x.mean(1)
        return (means[:, None] - means).abs()
    if kernel == "rbf":
        squares = x.square().sum(1)
        return torch.exp(-GAMMA * (squares[:, None] + squares - 2 * x @ x.T).clamp(min=0))
    products = x @ x.T
    if kernel == "bilinear":
        return products
    return sum(c * products**p for p, c in enumerate(TAYLOR))


def row_by_row(student: Tensor, teacher: Tensor, kernel: str) -> Tensor:
    """Return the Taylor expansion by a loop over rows, as public distillation code does."""
    x, y = F.normalize(student), F.normalize(teacher)
    total = 0.0
    for i in range(len(x)):
        of_student, of_teacher = (sum(c * (z @ z[i]) ** p for p, c in enumerate(TAYLOR)) for z in (x, y))
        total = total + (of_student - of_teacher).square().sum()
    return total / len(x) ** 2


def keops(student: Tensor, teacher: Tensor, kernel: str) -> Tensor:
    """Return the Taylor expansion or the Gaussian, streamed over all pairs."""
    from pykeops.torch import LazyTensor

    def correlations(x: Tensor) -> LazyTensor:
        one, other = LazyTensor(x[:, None]), LazyTensor(x[None])
        if kernel == "rbf":
            return (-GAMMA * (one - other).square().sum(-1)).exp()
        result = TAYLOR[-1]
        for c in TAYLOR[-2::-1]:
            result = result * (one | other) + c
        return result

    difference = correlations(F.normalize(student)) - correlations(F.normalize(teacher))
    return difference.square().sum(1).sum() / len(student) ** 2


def work(student: Tensor, teacher: Tensor, kernel: str) -> Work:
    if kernel == "bilinear":
        ((part,),) = kdkernels.explain("correlation_congruence_loss", student, teacher, kernel=kernel).stages
        return Work(multiply_adds=part.costs[part.form])
    return Work(multiply_adds=0 if kernel == "mmd" else 2 * student.shape[0] ** 2 * student.shape[1])


def case(batch: int, width: int, kernel: str = "taylor_rbf", headline: bool = False) -> Case:
    name = "CCKD" if kernel == "taylor_rbf" else f"CCKD {kernel}"
    uncompiled = where_installed(keops) if kernel in ("taylor_rbf", "rbf") and width <= 128 else {}
    if kernel == "taylor_rbf" and batch <= 1024:
        uncompiled |= {"row by row": row_by_row}
    arguments = batch, width, kernel
    return Case(
        f"{name} d={width}", batch, inputs, arguments, fused, {"textbook": textbook}, work, uncompiled, headline
    )


CASES = (
    *(case(batch, 128, headline=True) for batch in (64, 1024)),
    case(4096, 512, headline=True),
    *(case(batch, 128) for batch in (16, 256, 4096)),
    *(case(batch, 512) for batch in (64, 1024)),
    *(case(batch, 128, kernel) for kernel in ("rbf", "bilinear", "mmd") for batch in (64, 256, 1024)),
)


GRID = tuple(
    case(batch, width, kernel)
    for kernel in ("taylor_rbf", "rbf", "bilinear", "mmd")
    for width in (32, 128, 512)
    for batch in (2, 16, 64, 256, 1024, 4096)
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_correlation_congruence(compare, case):
    compare(case)


@pytest.mark.parametrize("case", GRID, ids=str)
def test_grid(compare, case):
    compare(case, memory=False)
