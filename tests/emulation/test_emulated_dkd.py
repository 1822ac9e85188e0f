"""``dkd`` in CUDA, emulated, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, assert_matches, loss_and_gradients, relative_error
from torch import Tensor

import kdkernels

from . import build

SETTINGS = {"alpha": 1.5, "beta": 2.0, "temperature": 2.5}


def logits(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(shape)).to(dtype).requires_grad_()


def check(student: Tensor, teacher: Tensor, labels: Tensor, **settings: object) -> None:
    def run(backend: str, student: Tensor, teacher: Tensor) -> Tensor:
        return kdkernels.dkd_loss(student, teacher, labels, backend=backend, **(SETTINGS | settings)).sum()

    assert_matches(lambda s, t: run("native", s, t), lambda s, t: run("reference", s, t), student, teacher)


@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (1, 3), (5, 33), (3, 100), (2, 1000), (1, 4099)])
def test_matches_the_reference(order: str, rows: int, classes: int) -> None:
    check(logits(rows, classes), logits(rows, classes), torch.randint(classes, (rows,)))
    assert build.launches() == 3


@pytest.mark.parametrize("student_dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
def test_dtypes_and_strides(student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    student = logits(21, 6, dtype=student_dtype).detach().t().requires_grad_()
    teacher = logits(12, 30, dtype=teacher_dtype).detach()[::2, 3:24].requires_grad_()
    check(student, teacher, torch.randint(21, (12,))[::2])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_rows_and_classes_that_do_not_count(order: str, reduction: str) -> None:
    gone = torch.arange(9) == 4
    student, teacher = (logits(6, 9).detach().masked_fill(gone, -torch.inf) for _ in range(2))
    student[3], teacher[1] = torch.nan, torch.inf
    labels, mask = torch.tensor([0, -100, 8, 99, 1, 4]), torch.arange(6) != 3
    leaves = [z.requires_grad_() for z in (student, teacher)]
    check(*leaves, labels, mask=mask, reduction=reduction)


def test_nothing_counts() -> None:
    loss, gradients = loss_and_gradients(
        lambda s, t: kdkernels.dkd_loss(s, t, torch.full((3,), -100), backend="native"), logits(3, 5), logits(3, 5)
    )
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients)


def test_a_label_that_is_no_class_gives_nan() -> None:
    """A GPU cannot raise without waiting for the kernel."""
    loss, gradient, _ = torch.ops.kdkernels_emulated.dkd(
        logits(3, 5).detach(), logits(3, 5).detach(), torch.tensor([0, 5, -1]), 1.0, 8.0, 4.0, 0, -100, True, False
    )
    assert loss.isnan()
    assert gradient[0].isfinite().all()
    assert gradient[1:].isnan().all()


@pytest.mark.parametrize("column", [0, 2])
def test_a_class_of_one_network(column: int) -> None:
    labels = torch.zeros(3, dtype=torch.int64)
    student, teacher = logits(3, 5).detach(), logits(3, 5).detach()
    teacher[1, column] = -torch.inf
    check(student.requires_grad_(), teacher.requires_grad_(), labels)
    student = student.detach()
    student[1, column] = -torch.inf
    assert kdkernels.dkd_loss(student, logits(3, 5), labels, backend="native") == torch.inf


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("label", [3, 37])
def test_nan_and_inf_give_nan(value: float, where: int, label: int) -> None:
    pair = [logits(3, 40).detach() for _ in range(2)]
    pair[where][1, 37] = value
    loss, (gradient, _) = loss_and_gradients(
        lambda s, t: kdkernels.dkd_loss(s, t, torch.full((3,), label), backend="native"),
        pair[0].requires_grad_(),
        pair[1],
    )
    assert loss.isnan()
    assert gradient[1].isnan().any()
    assert gradient[[0, 2]].isfinite().all()


def test_confident_teachers() -> None:
    """1 - p is far below the precision of p."""
    student, teacher = (torch.randn(2, 5) for _ in range(2))
    teacher[0, 1] += 80
    teacher[1, 2] += 80
    settings = {"alpha": 1.0, "beta": 0.0, "temperature": 1.0}
    found, exact = (
        kdkernels.dkd_loss(*pair, torch.tensor([1, 1]), backend=backend, **settings)
        for backend, pair in (("native", (student, teacher)), ("reference", (student.double(), teacher.double())))
    )
    assert relative_error(found, exact) < 1e-5
