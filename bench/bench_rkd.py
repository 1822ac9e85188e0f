"""RKD with angles. The textbook version holds b x b x d differences: ``pytest bench/bench_rkd.py``.

There is no limit, because the machine has no measured rate for the b³ comparisons of angles.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from measure import Case
from torch import Tensor

import kdkernels


def inputs(batch: int, width: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, width, requires_grad=True), torch.randn(batch, width)


def fused(student: Tensor, teacher: Tensor) -> Tensor:
    return kdkernels.relational_kd_loss(student, teacher)


def textbook(student: Tensor, teacher: Tensor) -> Tensor:
    distances = F.smooth_l1_loss(_distances(student), _distances(teacher))
    return 25 * distances + 50 * F.smooth_l1_loss(_angles(student), _angles(teacher))


def _distances(rows: Tensor) -> Tensor:
    products = rows @ rows.T
    squares = products.diagonal()
    distances = (squares[:, None] + squares - 2 * products).clamp(min=1e-12).sqrt()
    return distances / distances[distances > 1e-5].mean()


def _angles(rows: Tensor) -> Tensor:
    directions = F.normalize(rows - rows[:, None], dim=2)
    return directions @ directions.mT


CASES = tuple(
    Case(f"RKD d={width}", batch, inputs, (batch, width), fused, {"textbook": textbook}, headline=headline)
    for batch, width, headline in ((64, 128, True), (256, 512, True), (16, 128, False), (256, 128, False))
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rkd(compare, case):
    compare(case)
