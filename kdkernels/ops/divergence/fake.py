"""The schemas of ``divergence`` and the shapes of its results."""

from __future__ import annotations

from torch import Tensor

from ..operator import kernel
from ..shapes import accumulation_dtype
from .boundary import SAVED_MOMENTS, SAVED_NUMBERS, check_divergence, check_divergence_backward


@kernel(
    "divergence(Tensor student, Tensor teacher, Tensor temperatures, int kind, float beta, bool standardize,"
    " bool moments) -> (Tensor losses, Tensor saved)",
    check=check_divergence,
)
def divergence(
    student: Tensor, teacher: Tensor, temperatures: Tensor, kind: int, beta: float, standardize: bool, moments: bool
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(student, teacher)
    outer, inner, _ = student.shape
    numbers = SAVED_MOMENTS if moments else SAVED_NUMBERS
    return student.new_empty((outer, inner), dtype=dtype), student.new_empty((outer, inner, numbers), dtype=dtype)


@kernel(
    "divergence_backward(Tensor grad_losses, Tensor student, Tensor teacher, Tensor temperatures, Tensor saved,"
    " int kind, float beta, bool standardize, bool moments, bool grad_student, bool grad_teacher,"
    " bool to_temperatures) -> (Tensor grad_student, Tensor grad_teacher, Tensor grad_temperatures)",
    check=check_divergence_backward,
)
def divergence_backward(
    grad_losses: Tensor,
    student: Tensor,
    teacher: Tensor,
    temperatures: Tensor,
    saved: Tensor,
    kind: int,
    beta: float,
    standardize: bool,
    moments: bool,
    grad_student: bool,
    grad_teacher: bool,
    to_temperatures: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        new_rows(student, grad_student),
        new_rows(teacher, grad_teacher),
        temperatures.new_empty(
            temperatures.shape if to_temperatures else (0,), dtype=accumulation_dtype(student, teacher)
        ),
    )


def new_rows(x: Tensor, wanted: bool = True) -> Tensor:
    """Return a compact gradient of logits, outer x inner x K, with the classes inside or outside as in the logits."""
    if not wanted:
        return x.new_empty(0)
    outer, inner, classes = x.shape
    if x.stride(2) == 1 or inner == 1:
        return x.new_empty((outer, inner, classes), dtype=x.dtype)
    return x.new_empty((outer, classes, inner), dtype=x.dtype).transpose(1, 2)


KINDS = {"forward": 0, "reverse": 1, "jsd": 2}
