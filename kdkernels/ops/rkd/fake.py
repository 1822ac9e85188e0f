"""The schema of ``rkd`` and the shapes of its results."""

from __future__ import annotations

from torch import Tensor

from ..operator import kernel
from ..shapes import loss_and_gradients
from .boundary import check_rkd


@kernel(
    "rkd(Tensor student, Tensor teacher, float distance_weight, float angle_weight, bool grad_student,"
    " bool grad_teacher) -> (Tensor loss, Tensor grad_student, Tensor grad_teacher)",
    check=check_rkd,
)
def rkd(
    student: Tensor,
    teacher: Tensor,
    distance_weight: float,
    angle_weight: float,
    grad_student: bool,
    grad_teacher: bool,
) -> tuple[Tensor, ...]:
    return loss_and_gradients(student, teacher, grad_student, grad_teacher)
