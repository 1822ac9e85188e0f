"""``dist`` in CUDA, emulated, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, assert_matches, exactly, loss_and_gradients, relative_error
from torch import Tensor

import kdkernels

from . import build

SETTINGS = {"beta": 1.5, "gamma": 0.7, "temperature": 2.0}


def logits(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (2 * torch.randn(shape)).to(dtype).requires_grad_()


def run(student: Tensor, teacher: Tensor, backend: str = "native", **settings: object) -> Tensor:
    return kdkernels.dist_loss(student, teacher, backend=backend, **SETTINGS, **settings)


def check(student: Tensor, teacher: Tensor, **settings: object) -> None:
    assert_matches(
        lambda s, t: run(s, t, **settings), lambda s, t: run(s, t, "reference", **settings), student, teacher
    )


@pytest.mark.parametrize(("rows", "classes"), [(2, 2), (5, 33), (67, 10), (3, 100), (9, 300), (2, 4099)])
def test_matches_the_reference(order: str, rows: int, classes: int) -> None:
    check(logits(rows, classes), logits(rows, classes))
    assert build.launches() == 5


@pytest.mark.parametrize("student_dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
def test_dtypes_and_strides(student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    student = logits(21, 6, dtype=student_dtype).detach().t().requires_grad_()
    teacher = logits(12, 30, dtype=teacher_dtype).detach()[::2, 3:24].requires_grad_()
    check(student, teacher)


def test_rows_and_classes_that_do_not_count(order: str) -> None:
    gone = torch.rand(7, 40) < 0.2
    gone[:2] = False
    gone[:, 4] = True
    student, teacher = (logits(7, 40).detach().masked_fill(gone, -torch.inf) for _ in range(2))
    student[3], teacher[5] = torch.nan, torch.inf
    mask = torch.tensor([True, True, True, False, True, False, True])
    check(student.requires_grad_(), teacher.requires_grad_(), mask=mask.repeat_interleave(2)[::2])


def test_nothing_counts() -> None:
    loss, gradients = loss_and_gradients(
        lambda s, t: run(s, t, mask=torch.zeros(3, dtype=torch.bool)), logits(3, 5), logits(3, 5)
    )
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("rows", [1, 3])
def test_equal_samples(rows: int) -> None:
    check(logits(1, 6).detach().expand(rows, 6).requires_grad_(), logits(rows, 6))


def test_nearly_equal_networks() -> None:
    teacher = logits(8, 50)
    student = (teacher + 1e-2 * torch.randn(8, 50)).detach().requires_grad_()
    found = loss_and_gradients(run, student, teacher)
    exact = loss_and_gradients(lambda s, t: run(s, t, "reference"), *exactly(student, teacher))
    assert relative_error(found[0], exact[0]) < 1e-4
    for gradient, expected in zip(found[1], exact[1], strict=True):
        assert relative_error(gradient, expected) < 1e-3


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_nan_and_inf_give_nan(value: float, where: int) -> None:
    pair = [logits(3, 40).detach() for _ in range(2)]
    pair[where][1, 37] = value
    loss, (gradient, _) = loss_and_gradients(run, pair[0].requires_grad_(), pair[1])
    assert loss.isnan()
    assert gradient[1].isnan().any()
