"""The schema of ``congruence`` and the shapes of its results."""

from __future__ import annotations

from torch import Tensor

from ..operator import kernel
from .boundary import check_congruence


@kernel(
    "congruence(Tensor x, Tensor y, int positions, float[] coefficients, int[] plan, bool grad_x, bool grad_y,"
    " bool tf32=False) -> (Tensor loss, Tensor grad_x, Tensor grad_y)",
    check=check_congruence,
)
def congruence(
    x: Tensor,
    y: Tensor,
    positions: int,
    coefficients: list[float],
    plan: list[int],
    grad_x: bool,
    grad_y: bool,
    tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(()), x.new_empty(x.shape if grad_x else (0,)), x.new_empty(y.shape if grad_y else (0,))
