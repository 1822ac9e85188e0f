"""The schemas of ``icc`` and the shapes of its results."""

from __future__ import annotations

from torch import Tensor

from ..operator import kernel
from ..shapes import accumulation_dtype, loss_and_gradients
from .boundary import check_icc_loss, check_icc_map, check_icc_map_backward


@kernel("icc_map(Tensor logits) -> Tensor", check=check_icc_map)
def icc_map(logits: Tensor) -> Tensor:
    return logits.new_empty((logits.shape[1], logits.shape[1]), dtype=accumulation_dtype(logits))


@kernel("icc_map_backward(Tensor grad_map, Tensor logits) -> Tensor", check=check_icc_map_backward)
def icc_map_backward(grad_map: Tensor, logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape, dtype=accumulation_dtype(logits))


@kernel(
    "icc_loss(Tensor student, Tensor teacher, bool per_sample, float scale, bool grad_student, bool grad_teacher)"
    " -> (Tensor loss, Tensor grad_student, Tensor grad_teacher)",
    check=check_icc_loss,
)
def icc_loss(
    student: Tensor, teacher: Tensor, per_sample: bool, scale: float, grad_student: bool, grad_teacher: bool
) -> tuple[Tensor, ...]:
    return loss_and_gradients(student, teacher, grad_student, grad_teacher)
