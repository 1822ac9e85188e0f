"""The schemas of ``token_relation`` and ``token_relation_pairs``, and the shapes of their results."""

from __future__ import annotations

from torch import Tensor

from ..operator import kernel
from ..shapes import accumulation_dtype, new_samples
from .boundary import check_token_relation, check_token_relation_pairs


@kernel(
    "token_relation(Tensor student, Tensor teacher, Tensor? mask, int comparison, int clip, int heads, bool batch,"
    " bool channels, bool normalize, bool mean, int form, float student_temperature, float teacher_temperature,"
    " float margin, bool grad_student, bool grad_teacher) -> (Tensor loss, Tensor grad_student, Tensor grad_teacher)",
    check=check_token_relation,
)
def token_relation(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    comparison: int,
    clip: int,
    heads: int,
    batch: bool,
    channels: bool,
    normalize: bool,
    mean: bool,
    form: int,
    student_temperature: float,
    teacher_temperature: float,
    margin: float,
    grad_student: bool,
    grad_teacher: bool,
) -> tuple[Tensor, ...]:
    return _results([student, teacher], [grad_student, grad_teacher])


@kernel(
    "token_relation_pairs(Tensor student, Tensor student_keys, Tensor teacher, Tensor teacher_keys, Tensor? mask,"
    " Tensor? key_mask, int comparison, int clip, int heads, bool batch, bool channels, bool normalize, bool mean,"
    " float student_temperature, float teacher_temperature, float margin, bool grad_student, bool grad_student_keys,"
    " bool grad_teacher, bool grad_teacher_keys) -> (Tensor loss, Tensor grad_student, Tensor grad_student_keys,"
    " Tensor grad_teacher, Tensor grad_teacher_keys)",
    check=check_token_relation_pairs,
)
def token_relation_pairs(
    student: Tensor,
    student_keys: Tensor,
    teacher: Tensor,
    teacher_keys: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    comparison: int,
    clip: int,
    heads: int,
    batch: bool,
    channels: bool,
    normalize: bool,
    mean: bool,
    student_temperature: float,
    teacher_temperature: float,
    margin: float,
    grad_student: bool,
    grad_student_keys: bool,
    grad_teacher: bool,
    grad_teacher_keys: bool,
) -> tuple[Tensor, ...]:
    wanted = [grad_student, grad_student_keys, grad_teacher, grad_teacher_keys]
    return _results([student, student_keys, teacher, teacher_keys], wanted)


def _results(inputs: list[Tensor], wanted: list[bool]) -> tuple[Tensor, ...]:
    """Return the loss and the gradients, each in the memory format of its input. An unwanted gradient is empty."""
    dtype = accumulation_dtype(*inputs)
    empty = inputs[0].new_empty
    gradients = (
        new_samples(x, dtype) if want else empty((0,), dtype=dtype) for x, want in zip(inputs, wanted, strict=True)
    )
    return empty((), dtype=dtype), *gradients
