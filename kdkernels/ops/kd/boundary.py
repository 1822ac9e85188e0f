"""What ``kd`` expects of its arguments."""

from __future__ import annotations

from torch import Tensor

from ...boundary import Check


def check_kd(student: Tensor, teacher: Tensor, temperature: float, scale: float) -> None:
    check = Check("kd")
    check.tensor("student", student, "b K")
    check.tensor("teacher", teacher, "b K")
    check.positive("temperature", temperature)
    check.finite("scale", scale)
