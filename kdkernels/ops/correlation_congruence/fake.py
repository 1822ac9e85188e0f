"""The schema of ``correlation_congruence`` and the shapes of its results."""

from __future__ import annotations

from torch import Tensor

from ..operator import kernel as declare
from ..shapes import loss_and_gradients
from .boundary import check_correlation_congruence


@declare(
    "correlation_congruence(Tensor student, Tensor teacher, int kernel, float gamma, int order, bool normalize,"
    " float scale, int[] plan, bool grad_student, bool grad_teacher, bool tf32=False)"
    " -> (Tensor loss, Tensor grad_student, Tensor grad_teacher)",
    check=check_correlation_congruence,
)
def correlation_congruence(
    student: Tensor,
    teacher: Tensor,
    kernel: int,
    gamma: float,
    order: int,
    normalize: bool,
    scale: float,
    plan: list[int],
    grad_student: bool,
    grad_teacher: bool,
    tf32: bool = False,
) -> tuple[Tensor, ...]:
    return loss_and_gradients(student, teacher, grad_student, grad_teacher)
