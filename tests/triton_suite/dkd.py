"""``dkd``"""

from __future__ import annotations

import pytest
import torch
from helpers import assert_matches, relative_error
from torch import Tensor

import kdkernels

from . import FULL_PRECISION, draw, laid_out

SETTINGS = {"alpha": 1.5, "beta": 2.0, "temperature": 2.5}


@pytest.mark.parametrize("dtype", FULL_PRECISION)
@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (5, 3), (3, 100), (2, 4097)])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_dkd(device: str, dtype: torch.dtype, rows: int, classes: int, layout: str) -> None:
    student, teacher = (
        laid_out(3 * draw(rows, classes, device=device, dtype=dtype), layout).requires_grad_() for _ in range(2)
    )
    labels = (torch.randint(classes, (rows,), device=device)).repeat_interleave(2)[::2]

    def run(backend: str, student: Tensor, teacher: Tensor) -> Tensor:
        return kdkernels.dkd_loss(student, teacher, labels.to(student.device), backend=backend, **SETTINGS)

    assert_matches(lambda s, t: run("triton", s, t), lambda s, t: run("reference", s, t), student, teacher)


def test_dkd_of_rows_and_classes_that_do_not_count(device: str) -> None:
    student, teacher = (
        draw(6, 9, device=device).masked_fill(torch.arange(9, device=device) == 4, -torch.inf) for _ in "st"
    )
    labels = torch.tensor([0, -100, 8, 99, 1, 3], device=device)
    mask = torch.tensor([True, True, True, False, True, True], device=device)

    def run(backend: str, student: Tensor, teacher: Tensor) -> Tensor:
        return kdkernels.dkd_loss(student, teacher, labels, mask=mask, backend=backend, **SETTINGS)

    leaves = [z.requires_grad_() for z in (student, teacher)]
    assert_matches(lambda s, t: run("triton", s, t), lambda s, t: run("reference", s, t), *leaves)


def test_dkd_of_a_label_that_is_no_class_is_nan(device: str) -> None:
    student, teacher = (draw(3, 5, device=device) for _ in range(2))
    loss, gradient, _ = torch.ops.kdkernels_triton.dkd(
        student, teacher, torch.tensor([0, 5, -1], device=device), 1.0, 8.0, 4.0, True, -100, True, False
    )
    assert loss.isnan()
    assert gradient[0].isfinite().all()
    assert gradient[1:].isnan().all()


def test_dkd_of_a_confident_teacher(device: str) -> None:
    """1 - p is far below the precision of p."""
    student, teacher = (draw(2, 5, device=device) for _ in range(2))
    teacher[0, 1] += 80
    teacher[1, 2] += 80
    labels = torch.tensor([1, 1], device=device)
    settings = {"alpha": 1.0, "beta": 0.0, "temperature": 1.0}
    found = kdkernels.dkd_loss(student, teacher, labels, backend="triton", **settings)
    exact = kdkernels.dkd_loss(student.double(), teacher.double(), labels, backend="reference", **settings)
    assert relative_error(found, exact) < 1e-5
