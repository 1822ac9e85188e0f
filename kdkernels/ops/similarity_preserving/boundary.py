"""What ``similarity_preserving`` expects of its arguments."""

from __future__ import annotations

import math

from torch import Tensor

from ...boundary import Check


def check_similarity_preserving(student: Tensor, teacher: Tensor, scale: float, feature: bool) -> None:
    check = Check("similarity_preserving")
    check.tensor("student", student, "n ...")
    check.tensor("teacher", teacher, "n ...")
    if feature:
        for name, features in (("student", student), ("teacher", teacher)):
            width = math.prod(features.shape[1:])
            check.fits(name, width, width)
    check.finite("scale", scale)
