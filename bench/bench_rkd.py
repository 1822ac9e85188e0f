"""RKD with its angles against the textbook's b x b x d differences, eager and compiled: ``pytest bench/bench_rkd.py``.

Measured as in bench_kd.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from measure import compare, compiled, peaks
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


BASELINES = {"textbook": textbook}
VARIANTS = {"fused": fused, **BASELINES}


@pytest.mark.parametrize(("batch", "width"), [(64, 128), (256, 512)])
def test_rkd(benchmark, batch, width):
    memory = peaks(VARIANTS, inputs, batch, width)
    compare(benchmark, VARIANTS | compiled(BASELINES), inputs(batch, width), peaks=memory)
