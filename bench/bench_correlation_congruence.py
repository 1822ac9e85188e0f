"""CCKD's loss against eager and compiled PyTorch: ``pytest bench/bench_correlation_congruence.py``.

Measured as in bench_congruence.py. The limit is this machine's matrix-product rate on the multiply-adds of two
symmetric Gram matrices and of one gradient.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from measure import compare, compiled, gemm_rate, peaks
from torch import Tensor

import kdkernels

GAMMA, ORDER = 0.4, 2
KERNELS = ("taylor_rbf", "rbf", "bilinear", "mmd")
NAMED = ((64, 128), (1024, 128), (4096, 512))
GRID = [(batch, width) for batch in (2, 16, 64, 256, 1024, 4096) for width in (32, 128, 512)]


def fused(student: Tensor, teacher: Tensor, kernel: str = "taylor_rbf") -> Tensor:
    return kdkernels.correlation_congruence_loss(student, teacher, kernel=kernel, gamma=GAMMA, order=ORDER)


def textbook(student: Tensor, teacher: Tensor, kernel: str = "taylor_rbf") -> Tensor:
    """Eq. 6 as one would write it: both kernel matrices, and the mean of their squared difference."""
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
    return math.exp(-2 * GAMMA) * sum((2 * GAMMA) ** p / math.factorial(p) * products**p for p in range(ORDER + 1))


def row_by_row(student: Tensor, teacher: Tensor, kernel: str = "taylor_rbf") -> Tensor:
    """The loop over rows that public distillation code runs."""
    x, y = F.normalize(student), F.normalize(teacher)
    scale = [math.exp(-2 * GAMMA) * (2 * GAMMA) ** p / math.factorial(p) for p in range(ORDER + 1)]
    total = 0.0
    for i in range(len(x)):
        of_student, of_teacher = (sum(c * (z @ z[i]) ** p for p, c in enumerate(scale)) for z in (x, y))
        total = total + (of_student - of_teacher).square().sum()
    return total / len(x) ** 2


def inputs(batch: int, width: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, width, requires_grad=True), torch.randn(batch, width)


VARIANTS = {"fused": fused, "textbook": textbook}
COMPILED = compiled({"textbook": textbook})


@pytest.mark.parametrize("case", NAMED, ids="{0[0]} x {0[1]}".format)
def test_correlation_congruence(benchmark, case):
    batch, width = case
    variants = VARIANTS | COMPILED | {"row by row": row_by_row}
    multiply_adds = 2 * batch * batch * width  # two halves of Gram matrices, one gradient
    memory = peaks(VARIANTS, inputs, batch, width)
    compare(benchmark, variants, inputs(batch, width), limit=multiply_adds / gemm_rate(), peaks=memory)


@pytest.mark.parametrize("case", GRID, ids="{0[0]} x {0[1]}".format)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels(benchmark, kernel, case):
    compare(benchmark, VARIANTS | COMPILED, (*inputs(*case), kernel))
