"""What ``dkd`` expects of its arguments."""

from __future__ import annotations

from torch import Tensor

from ...boundary import LABELS, Check


def check_dkd(
    student: Tensor, teacher: Tensor, labels: Tensor, alpha: float, beta: float, temperature: float, reduction: int
) -> None:
    check = Check("dkd")
    check.tensor("student", student, "N K")
    check.tensor("teacher", teacher, "N K")
    check.tensor("labels", labels, "N", LABELS)
    check.finite("alpha", alpha)
    check.finite("beta", beta)
    check.positive("temperature", temperature)
    if not 0 <= reduction <= 2:
        check.fail(f"reduction must be 0 (mean), 1 (sum) or 2 (none), got {reduction}")
