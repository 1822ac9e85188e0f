"""``dist``"""

from __future__ import annotations

import pytest
import torch
from helpers import assert_matches
from torch import Tensor

import kdkernels

from . import FULL_PRECISION, draw, laid_out

SETTINGS = {"beta": 1.5, "gamma": 0.7, "temperature": 2.0}


def run_dist(student: Tensor, teacher: Tensor) -> Tensor:
    return kdkernels.dist_loss(student, teacher, backend="triton", **SETTINGS)


def expected_dist(student: Tensor, teacher: Tensor) -> Tensor:
    return kdkernels.dist_loss(student, teacher, backend="reference", **SETTINGS)


@pytest.mark.parametrize("dtype", FULL_PRECISION)
@pytest.mark.parametrize(("rows", "classes"), [(2, 3), (5, 33), (67, 100), (2, 4097)])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_dist(device: str, dtype: torch.dtype, rows: int, classes: int, layout: str) -> None:
    student, teacher = (
        laid_out(2 * draw(rows, classes, device=device, dtype=dtype), layout).requires_grad_() for _ in range(2)
    )
    assert_matches(run_dist, expected_dist, student, teacher)


def test_dist_of_rows_and_classes_that_do_not_count(device: str) -> None:
    gone = torch.rand(7, 9, device=device) < 0.2
    gone[:2] = False
    gone[:, 4] = True
    student, teacher = (draw(7, 9, device=device).masked_fill(gone, -torch.inf).requires_grad_() for _ in range(2))
    mask = torch.arange(7, device=device) != 3

    def run(backend: str, student: Tensor, teacher: Tensor) -> Tensor:
        return kdkernels.dist_loss(student, teacher, mask=mask, backend=backend, **SETTINGS)

    assert_matches(lambda s, t: run("triton", s, t), lambda s, t: run("reference", s, t), student, teacher)
