"""The schema of ``kd`` and the shapes of its results."""

from __future__ import annotations

from torch import Tensor

from ..operator import kernel
from ..shapes import loss_and_gradients
from .boundary import check_kd


@kernel(
    "kd(Tensor student, Tensor teacher, float temperature, float scale, bool grad_student, bool grad_teacher)"
    " -> (Tensor loss, Tensor grad_student, Tensor grad_teacher)",
    check=check_kd,
)
def kd(
    student: Tensor, teacher: Tensor, temperature: float, scale: float, grad_student: bool, grad_teacher: bool
) -> tuple[Tensor, ...]:
    return loss_and_gradients(student, teacher, grad_student, grad_teacher)
