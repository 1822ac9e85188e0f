"""rkd against the definition in float64, and its contracts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, assert_matches, exactly, loss_and_gradients
from torch import Tensor

import kdkernels
from kdkernels import native

needs_native = pytest.mark.skipif(
    native.why_not(torch.device("cpu")) is not None, reason=str(native.why_not(torch.device("cpu")))
)
SHAPES = [(1, 3, 2), (2, 1, 1), (3, 4, 9), (8, 16, 5), (17, 33, 65), (40, 7, 8)]


@pytest.fixture(params=["reference", "native"])
def backend(request) -> str:
    """RKD has no Triton kernel."""
    if request.param == "native" and native.why_not(torch.device("cpu")):
        pytest.skip("not built")
    return request.param


def definition(student: Tensor, teacher: Tensor, distance_weight: float = 25.0, angle_weight: float = 50.0) -> Tensor:
    """Return the equations with b x b x d differences and b x b x b angles."""

    def relations(rows: Tensor) -> tuple[Tensor, Tensor]:
        differences = rows[:, None] - rows
        squares = differences.square().sum(2)
        apart = squares != 0
        distances = torch.where(apart, torch.where(apart, squares, 1).sqrt(), 0)
        directions = torch.where(apart[:, :, None], differences / torch.where(apart, distances, 1)[:, :, None], 0)
        mean = distances.sum() / apart.sum() if apart.any() else 1
        return distances / mean, directions @ directions.mT

    (d_s, a_s), (d_t, a_t) = relations(student), relations(teacher)
    return distance_weight * F.smooth_l1_loss(d_s, d_t) + angle_weight * F.smooth_l1_loss(a_s, a_t)


def draw(*shape: int, dtype: torch.dtype = torch.float32, requires_grad: bool = True) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_(requires_grad)


def check(backend: str, student: Tensor, teacher: Tensor, **settings: float) -> None:
    assert_matches(
        lambda s, t: kdkernels.relational_kd_loss(s, t, backend=backend, **settings),
        lambda s, t: definition(s, t, **settings),
        student,
        teacher,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weights", [(25.0, 50.0), (1.0, 0.0), (0.0, 1.0)])
def test_matches_the_definition(backend, shape, weights):
    batch, width, other = shape
    check(backend, draw(batch, width), draw(batch, other), distance_weight=weights[0], angle_weight=weights[1])


def test_large_relative_distances(backend):
    """For outliers, the difference of relative distances exceeds the quadratic part of the smooth L1."""
    student, teacher = draw(7, 5).detach(), draw(7, 5).detach()
    student[2] *= 100
    teacher[4] *= 100
    check(backend, student.requires_grad_(), teacher.requires_grad_())


def test_zero_and_equal_rows(backend):
    """Gradients are finite, and zero between equal samples. Other gradients do not change."""
    student, teacher = draw(8, 5).detach(), draw(8, 6).detach()
    student[1] = student[4] = 0
    student[2] = student[7]
    teacher[0] = teacher[7]
    check(backend, student.requires_grad_(), teacher.requires_grad_())
    same = torch.ones(5, 3, requires_grad=True)
    loss = kdkernels.relational_kd_loss(same, torch.ones(5, 4), backend=backend)
    loss.backward()
    assert loss == 0
    assert torch.equal(same.grad, torch.zeros(5, 3))


def test_close_rows(backend):
    """A pair with a relative distance of 1e-6 keeps its direction."""
    student, teacher = draw(8, 5, dtype=torch.float64).detach(), draw(8, 6, dtype=torch.float64)
    student[1] = student[0] + 1e-6 * torch.randn(5)
    loss, (gradient, _) = loss_and_gradients(
        lambda s, t: kdkernels.relational_kd_loss(s, t, backend=backend), student.requires_grad_(), teacher
    )
    expected, (correct, _) = loss_and_gradients(definition, student, teacher)
    assert abs(loss - expected) < 1e-8
    assert (gradient - correct).norm() < 1e-7 * correct.norm()


def test_explain_names_the_backend():
    student, teacher = draw(5, 4), draw(5, 3)
    told = kdkernels.explain("relational_kd_loss", student, teacher)
    assert (told.backend == "native") == ("native" not in told.obstacles)
    assert "triton" in told.obstacles
    told = kdkernels.explain("relational_kd_loss", student, teacher, backend="reference")
    assert str(told).startswith("relational_kd_loss: reference backend")
    with pytest.raises(RuntimeError, match="backend='triton' cannot run here"):
        kdkernels.explain("relational_kd_loss", student, teacher, backend="triton")
    with pytest.raises(ValueError, match="teacher must have student's batch size 5, got 4"):
        kdkernels.explain("relational_kd_loss", student, teacher[:4])


def test_module():
    student, teacher = draw(6, 5), draw(6, 4)
    loss = kdkernels.nn.RelationalKDLoss(distance_weight=2.0, angle_weight=3.0)(student, teacher)
    assert_close(loss, definition(*exactly(student, teacher), 2.0, 3.0))


@pytest.mark.parametrize(
    ("student", "teacher", "settings", "error", "message"),
    [
        (1, torch.ones(2, 3), {}, TypeError, "student must be a tensor, got int"),
        (torch.ones(2, 3, 1), torch.ones(2, 3), {}, ValueError, "student must have shape b x d"),
        (torch.ones(2, 3), torch.ones(3, 3), {}, ValueError, "teacher must have student's batch size 2, got 3"),
        (torch.ones(2, 3), torch.ones(2, 3), {"angle_weight": -1}, ValueError, "angle_weight must be a number >= 0"),
        (torch.ones(2, 3), torch.ones(2, 3), {"distance_weight": "1"}, ValueError, "distance_weight must be"),
    ],
)
def test_misuse_is_explained(student, teacher, settings, error, message):
    with pytest.raises(error, match=message):
        kdkernels.relational_kd_loss(student, teacher, **settings)
