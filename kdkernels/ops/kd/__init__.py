"""Knowledge distillation's temperature-softened KL divergence in one pass over the logits."""

from __future__ import annotations

from torch import Tensor

from ... import backends, checks
from . import reference


def kd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float, backend: str = "auto") -> Tensor:
    """Batch mean of KL(softmax(teacher / T) ‖ softmax(student / T)); see ``kdkernels.kd_loss``."""
    check(student_logits, teacher_logits, temperature)
    run = {"reference": reference.kd}[backends.choose(backend, student_logits)]
    return run(student_logits, teacher_logits, float(temperature))


def check(student: object, teacher: object, temperature: float) -> None:
    student = checks.tensor("student_logits", student, 2, "b x K")
    teacher = checks.tensor("teacher_logits", teacher, 2, "b x K")
    checks.same_batch("teacher_logits", teacher, "student_logits", student)
    checks.same_device("teacher_logits", teacher, "student_logits", student)
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"teacher_logits must have student_logits' {student.shape[1]} classes, got {teacher.shape[1]}"
        )
    checks.positive("temperature", temperature)
