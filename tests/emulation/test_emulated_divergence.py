"""``divergence`` in CUDA, emulated, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, assert_close, assert_matches, exactly, loss_and_gradients, relative_error
from torch import Tensor

import kdkernels

from . import build

KINDS = [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.5), ("jsd", 0.1)]
kinds = pytest.mark.parametrize(("divergence", "beta"), KINDS)


def logits(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 2.0) -> Tensor:
    return (scale * torch.randn(shape)).to(dtype).requires_grad_()


def run(backend: str, *inputs: Tensor, **settings: object) -> Tensor:
    student, teacher, *temperature = inputs
    given = {"temperature": temperature[0] if temperature else 2.5, "reduction": "sum"} | settings
    return kdkernels.kd_loss(student, teacher, backend=backend, **given)


def check(*inputs: Tensor, **settings: object) -> None:
    assert_matches(lambda *x: run("native", *x, **settings), lambda *x: run("reference", *x, **settings), *inputs)


@kinds
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 33), (1, 3), (3, 100), (2, 1000), (1, 4093)], ids=str)
def test_matches_the_reference(shape, divergence, beta, standardize):
    check(logits(*shape), logits(*shape), divergence=divergence, beta=beta, standardize=standardize)
    assert build.launches() == 2


@kinds
def test_masks_and_a_temperature_per_row(order, divergence, beta):
    mask = torch.tensor([[True, False, True], [True, True, True]])
    student, teacher = logits(2, 70, 3).detach(), logits(2, 70, 3).detach()
    student[0, :, 1], teacher[0, 4, 1] = torch.nan, torch.inf
    settings = {"dim": 1, "mask": mask, "divergence": divergence, "beta": beta, "standardize": True}
    check(student.requires_grad_(), teacher.requires_grad_(), (1 + torch.rand(2, 3)).requires_grad_(), **settings)


@pytest.mark.parametrize("student_dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
def test_dtypes_and_strides(student_dtype, teacher_dtype):
    student = logits(21, 6, dtype=student_dtype).detach().t().requires_grad_()
    teacher = logits(12, 30, dtype=teacher_dtype).detach()[::2, 3:24].requires_grad_()
    for divergence, beta in KINDS:
        check(student, teacher, divergence=divergence, beta=beta)


@pytest.mark.parametrize("student_learns", [False, True])
def test_a_gradient_that_is_not_wanted(student_learns):
    """Without moments, the forward kernel saves fewer numbers."""
    for divergence, beta in KINDS:
        student, teacher = (logits(3, 40).detach() for _ in range(2))
        (student if student_learns else teacher).requires_grad_()
        check(student, teacher, divergence=divergence, beta=beta)
    temperature = torch.tensor(2.0, requires_grad=True)
    check(logits(3, 40).detach(), logits(3, 40).detach(), temperature)


@kinds
def test_gradcheck(divergence, beta):
    def loss(*inputs: Tensor) -> Tensor:
        return run("native", *inputs, divergence=divergence, beta=beta, standardize=True, reduction="none")

    temperature = (1 + torch.rand(2, 1)).double().requires_grad_()
    assert torch.autograd.gradcheck(
        loss, (logits(2, 2, 5, dtype=torch.float64), logits(2, 2, 5, dtype=torch.float64), temperature)
    )


@kinds
@pytest.mark.parametrize("standardize", [False, True])
def test_absent_classes(divergence, beta, standardize):
    """-inf in both networks, only in the teacher, and only in the student."""
    settings = {"divergence": divergence, "beta": beta, "standardize": standardize}
    student, teacher = (logits(4, 40).detach() for _ in range(2))
    student[:, [0, 33]] = teacher[:, [0, 33]] = -torch.inf
    first = student if divergence == "reverse" else teacher
    first[1, 7] = -torch.inf
    check(student.requires_grad_(), teacher.requires_grad_(), **settings)
    second = teacher if divergence == "reverse" else student
    second.data[2, 9] = second.data[3, first[3].argmax()] = -torch.inf
    loss, gradients = loss_and_gradients(lambda s, t: run("native", s, t, **settings), student, teacher)
    expected, exact = loss_and_gradients(lambda s, t: run("reference", s, t, **settings), *exactly(student, teacher))
    assert loss == torch.inf if divergence != "jsd" else relative_error(loss, expected) < 1e-5
    if divergence == "jsd" or not standardize:  # otherwise, the standard deviation takes part in an infinite loss
        for gradient, correct in zip(gradients, exact, strict=True):
            assert_close(gradient, correct)


@kinds
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_nan_and_inf_give_nan(divergence, beta, value, where):
    pair = [logits(3, 40).detach() for _ in range(2)]
    pair[where][1, 37] = value
    loss, gradients = loss_and_gradients(
        lambda s, t: run("native", s, t, divergence=divergence, beta=beta), *(x.requires_grad_() for x in pair)
    )
    assert loss.isnan()
    for gradient in gradients:
        assert gradient[1].isnan().all()
        assert gradient[[0, 2]].isfinite().all()


def test_a_small_divergence_is_precise():
    teacher = logits(16, 100)
    student = (teacher + 1e-3 * torch.randn(16, 100)).detach().requires_grad_()
    for divergence, beta in KINDS:
        settings = {"divergence": divergence, "beta": beta}
        loss, gradients = loss_and_gradients(lambda s, t, x=settings: run("native", s, t, **x), student, teacher)
        correct, exact = loss_and_gradients(
            lambda s, t, x=settings: run("reference", s, t, **x), *exactly(student, teacher)
        )
        assert relative_error(loss, correct) < 1e-4
        for gradient, right in zip(gradients, exact, strict=True):
            assert relative_error(gradient, right) < 1e-3


@kinds
def test_confident_networks(divergence, beta):
    student, teacher = (300 * torch.randn(4, 50) for _ in range(2))
    settings = {"divergence": divergence, "beta": beta}
    assert_close(
        run("native", student, teacher, **settings), run("reference", student.double(), teacher.double(), **settings)
    )
