"""The schema of ``similarity_preserving`` and the shapes of its results."""

from __future__ import annotations

from torch import Tensor

from ..operator import kernel
from ..shapes import accumulation_dtype, new_samples
from .boundary import check_similarity_preserving


@kernel(
    "similarity_preserving(Tensor student, Tensor teacher, float scale, bool feature, bool grad_student,"
    " bool grad_teacher) -> (Tensor loss, Tensor grad_student, Tensor grad_teacher)",
    check=check_similarity_preserving,
)
def similarity_preserving(
    student: Tensor, teacher: Tensor, scale: float, feature: bool, grad_student: bool, grad_teacher: bool
) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(student, teacher)
    grads = (
        new_samples(x, dtype) if wanted else student.new_empty((0,), dtype=dtype)
        for x, wanted in ((student, grad_student), (teacher, grad_teacher))
    )
    return student.new_empty((), dtype=dtype), *grads
