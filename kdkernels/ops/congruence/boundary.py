"""What ``congruence`` expects of its arguments."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...boundary import FULL_FLOATS, Check


def check_congruence(
    x: Tensor, y: Tensor, positions: int, coefficients: Sequence[float], plan: Sequence[int], grad_y: bool
) -> None:
    check = Check("congruence")
    check.tensor("x", x, "N d_S", FULL_FLOATS)
    check.tensor("y", y, "N d_T", FULL_FLOATS)
    check.same_type("y", y, "x", x)
    rows = x.shape[0]
    check.fits("x", rows, rows)
    check.fits("x", x.shape[1], x.shape[1])
    check.fits("y", y.shape[1], y.shape[1])
    check.fits_gpu("x", "rows", rows)
    check.fits_gpu("x", "columns", x.shape[1])
    check.fits_gpu("y", "columns", y.shape[1])
    check.positive_int("positions", positions)
    check.require(rows % positions == 0, lambda: f"positions must divide the number of rows {rows}, got {positions}")
    check.all_finite("coefficients", coefficients, 4, "factors")
    check.holds("plan", plan, 3, "form codes")
    check.plan("plan", plan, 0, grad_y)
