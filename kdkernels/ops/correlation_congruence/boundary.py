"""What ``correlation_congruence`` expects of its arguments."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...boundary import Check

BILINEAR = 2


def check_correlation_congruence(
    student: Tensor,
    teacher: Tensor,
    kernel: int,
    gamma: float,
    order: int,
    scale: float,
    plan: Sequence[int],
    grad_teacher: bool,
) -> None:
    check = Check("correlation_congruence")
    check.tensor("student", student, "n d_S")
    check.tensor("teacher", teacher, "n d_T")
    rows = student.shape[0]
    check.fits("student", rows, rows)
    check.fits("student", student.shape[1], student.shape[1])
    check.fits("teacher", teacher.shape[1], teacher.shape[1])
    check.fits_gpu("student", "rows", rows)
    check.fits_gpu("student", "columns", student.shape[1])
    check.fits_gpu("teacher", "columns", teacher.shape[1])
    if not 0 <= kernel <= 3:
        check.fail(f"kernel must be 0 (taylor_rbf), 1 (rbf), 2 (bilinear) or 3 (mmd), got {kernel}")
    check.positive("gamma", gamma)
    check.non_negative_int("order", order)
    check.finite("scale", scale)
    check.holds("plan", plan, 3, "form codes")
    check.plan("plan", plan, 0, grad_teacher)
    if kernel != BILINEAR and plan[0] != 0:
        check.fail(f"plan[0] must be 0 (gram) for every kernel but the bilinear one, got {plan[0]}")
