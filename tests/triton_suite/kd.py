"""``kd``"""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, assert_matches
from torch import Tensor

import kdkernels
from kdkernels.ops.kd import reference as kd_reference

from . import FULL_PRECISION, draw, laid_out


def run_kd(student: Tensor, teacher: Tensor) -> Tensor:
    return kdkernels.kd_loss(student, teacher, temperature=2.5, backend="triton")


def expected_kd(student: Tensor, teacher: Tensor) -> Tensor:
    return kd_reference.kd(student, teacher, 2.5) * 2.5**2


@pytest.mark.parametrize("dtype", FULL_PRECISION)
@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (5, 3), (3, 100), (2, 4097)])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_kd(device: str, dtype: torch.dtype, rows: int, classes: int, layout: str) -> None:
    student, teacher = (
        laid_out(3 * draw(rows, classes, device=device, dtype=dtype), layout).requires_grad_() for _ in range(2)
    )
    assert_matches(run_kd, expected_kd, student, teacher)


def test_kd_of_confident_networks(device: str) -> None:
    """Logits whose exponentials overflow and underflow float32."""
    student, teacher = (300 * draw(4, 50, device=device, dtype=torch.float64) for _ in range(2))
    loss = run_kd(student.float(), teacher.float())
    assert_close(loss, expected_kd(student.float().double(), teacher.float().double()))
