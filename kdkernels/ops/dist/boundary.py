"""What ``dist`` expects of its arguments."""

from __future__ import annotations

from torch import Tensor

from ...boundary import MASK, Check


def check_dist(
    student: Tensor, teacher: Tensor, mask: Tensor | None, beta: float, gamma: float, temperature: float
) -> None:
    check = Check("dist")
    check.tensor("student", student, "N K")
    check.tensor("teacher", teacher, "N K")
    if mask is not None:
        check.tensor("mask", mask, "N", MASK)
    check.finite("beta", beta)
    check.finite("gamma", gamma)
    check.positive("temperature", temperature)
