"""The schemas of ``top_k`` and the shapes of its results."""

from __future__ import annotations

from torch import Tensor

from ..operator import kernel
from ..shapes import accumulation_dtype
from .boundary import check_top_k, check_top_k_backward


@kernel("top_k(Tensor student, Tensor indices, Tensor temperatures) -> Tensor exponents", check=check_top_k)
def top_k(student: Tensor, indices: Tensor, temperatures: Tensor) -> Tensor:
    return student.new_empty((indices.shape[0], indices.shape[1] + 1), dtype=accumulation_dtype(student))


@kernel(
    "top_k_backward(Tensor grad_exponents, Tensor student, Tensor indices, Tensor temperatures, bool grad_student,"
    " bool to_temperatures) -> (Tensor grad_student, Tensor grad_temperatures)",
    check=check_top_k_backward,
)
def top_k_backward(
    grad_exponents: Tensor,
    student: Tensor,
    indices: Tensor,
    temperatures: Tensor,
    grad_student: bool,
    to_temperatures: bool,
) -> tuple[Tensor, Tensor]:
    return (
        student.new_empty(student.shape if grad_student else (0,)),
        student.new_empty(temperatures.shape if to_temperatures else (0,), dtype=accumulation_dtype(student)),
    )
