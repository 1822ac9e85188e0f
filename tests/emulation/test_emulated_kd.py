"""``kd`` in CUDA, emulated, against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, assert_close, assert_matches, exactly, loss_and_gradients, relative_error
from torch import Tensor

import kdkernels
from kdkernels.ops.kd import reference

from . import build


def run(student: Tensor, teacher: Tensor) -> Tensor:
    return kdkernels.kd_loss(student, teacher, temperature=2.5, backend="native")


def expected(student: Tensor, teacher: Tensor) -> Tensor:
    return reference.kd(student, teacher, 2.5) * 2.5**2


def logits(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(shape)).to(dtype).requires_grad_()


@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (1, 3), (5, 33), (3, 100), (2, 1000), (1, 4093)])
def test_matches_the_definition(order: str, rows: int, classes: int) -> None:
    student, teacher = logits(rows, classes), logits(rows, classes)
    assert_matches(run, expected, student, teacher)
    assert build.launches() == 2


@pytest.mark.parametrize("student_dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
def test_dtypes_and_strides(student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    student = logits(21, 6, dtype=student_dtype).detach().t().requires_grad_()
    teacher = logits(12, 30, dtype=teacher_dtype).detach()[::2, 3:24].requires_grad_()
    assert_matches(run, expected, student, teacher)


def test_a_small_divergence_is_precise() -> None:
    teacher = logits(16, 100)
    student = (teacher + 1e-3 * torch.randn(16, 100)).detach().requires_grad_()
    loss, gradients = loss_and_gradients(run, student, teacher)
    correct, correct_gradients = loss_and_gradients(expected, *exactly(student, teacher))
    assert relative_error(loss, correct) < 1e-4
    for gradient, exact in zip(gradients, correct_gradients, strict=True):
        assert relative_error(gradient, exact) < 1e-3


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_nan_and_inf_give_nan(value: float, where: int) -> None:
    pair = [logits(3, 40).detach() for _ in range(2)]
    pair[where][1, 37] = value
    loss, (gradient, _) = loss_and_gradients(run, pair[0].requires_grad_(), pair[1])
    assert loss.isnan()
    assert gradient[1].isnan().all()
    assert gradient[[0, 2]].isfinite().all()


def test_absent_classes() -> None:
    """-inf in both networks, only in the teacher, and only in the student."""
    pair = [logits(4, 40).detach() for _ in range(2)]
    pair[0][:, 3], pair[1][:, 3], pair[1][1, 37] = -torch.inf, -torch.inf, -torch.inf
    assert_matches(run, expected, *(x.requires_grad_() for x in pair))
    pair[0].data[2, 9] = -torch.inf
    loss, gradients = loss_and_gradients(run, *pair)
    _, exact = loss_and_gradients(expected, *exactly(*pair))
    assert loss == torch.inf
    for gradient, correct in zip(gradients, exact, strict=True):
        assert_close(gradient, correct)


def test_confident_networks() -> None:
    student, teacher = (300 * torch.randn(4, 50) for _ in range(2))
    assert_close(run(student, teacher), expected(student.double(), teacher.double()))
