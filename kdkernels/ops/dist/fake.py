"""The schema of ``dist`` and the shapes of its results."""

from __future__ import annotations

from torch import Tensor

from ..operator import kernel
from ..shapes import loss_and_gradients
from .boundary import check_dist


@kernel(
    "dist(Tensor student, Tensor teacher, Tensor? mask, float beta, float gamma, float temperature, bool grad_student, "
    "bool grad_teacher) -> (Tensor loss, Tensor grad_student, Tensor grad_teacher)",
    check=check_dist,
)
def dist(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    beta: float,
    gamma: float,
    temperature: float,
    grad_student: bool,
    grad_teacher: bool,
) -> tuple[Tensor, ...]:
    return loss_and_gradients(student, teacher, grad_student, grad_teacher)
