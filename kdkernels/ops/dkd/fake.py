"""The schema of ``dkd`` and the shapes of its results."""

from __future__ import annotations

from torch import Tensor

from ..operator import kernel
from ..shapes import loss_and_gradients
from .boundary import check_dkd


@kernel(
    "dkd(Tensor student, Tensor teacher, Tensor labels, float alpha, float beta, float temperature, int reduction, "
    "int ignore_index, bool grad_student, bool grad_teacher) "
    "-> (Tensor loss, Tensor grad_student, Tensor grad_teacher)",
    check=check_dkd,
)
def dkd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
    reduction: int,
    ignore_index: int,
    grad_student: bool,
    grad_teacher: bool,
) -> tuple[Tensor, ...]:
    loss, *gradients = loss_and_gradients(student, teacher, grad_student, grad_teacher)
    return loss if reduction < 2 else loss.new_empty(student.shape[0]), *gradients
