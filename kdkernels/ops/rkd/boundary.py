"""What ``rkd`` expects of its arguments."""

from __future__ import annotations

from torch import Tensor

from ...boundary import Check


def check_rkd(student: Tensor, teacher: Tensor, distance_weight: float, angle_weight: float) -> None:
    check = Check("rkd")
    check.tensor("student", student, "b d_S")
    check.tensor("teacher", teacher, "b d_T")
    check.fits("student", student.shape[0], student.shape[0])
    check.non_negative("distance_weight", distance_weight)
    check.non_negative("angle_weight", angle_weight)
