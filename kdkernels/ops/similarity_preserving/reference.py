"""Similarity-preserving distillation in plain PyTorch: the specification of ``similarity_preserving``."""

from __future__ import annotations

from torch import Tensor

from ..patches.reference import unit_rows
from ..shapes import accumulation_dtype

EPS = 1e-12  # a row of similarities with this norm or less is zero


def gram_form(student: Tensor, teacher: Tensor, scale: float) -> Tensor:
    """Return ``scale · ‖Q_S − Q_T‖²``, where Q is the Gram matrix with each row divided by its norm."""
    x, y = _rows(student, teacher)
    return scale * (unit_rows(x @ x.T, EPS) - unit_rows(y @ y.T, EPS)).square().sum()


def feature_form(student: Tensor, teacher: Tensor, scale: float) -> Tensor:
    """Return the same without an n x n matrix, from ``(X Xᵀ)_i · (Y Yᵀ)_i = x_iᵀ (XᵀY) y_i``.

    The term of a row, 2 minus twice a cosine, nearly cancels for a good student, so it is computed in float64.
    """
    x, y = _rows(student, teacher)
    dtype = x.dtype
    x, y = x.double(), y.double()
    norms_x, norms_y = (_row_products(rows, rows).clamp(min=0) for rows in (x, y))
    dead_x, dead_y = (norms <= EPS**2 for norms in (norms_x, norms_y))
    either = dead_x | dead_y
    lengths = (norms_x.masked_fill(either, 1) * norms_y.masked_fill(either, 1)).sqrt()
    cosines = (_row_products(x, y) / lengths).masked_fill(either, 0)
    undefined = 0 * (norms_x + norms_y).detach()  # NaN stays NaN even if the other network's row is zero
    return (scale * ((~dead_x).double() + (~dead_y).double() - 2 * cosines + undefined).sum()).to(dtype)


def _row_products(x: Tensor, y: Tensor) -> Tensor:
    """Return the dot products of the rows of X Xᵀ with the rows of Y Yᵀ."""
    return ((x @ (x.T @ y)) * y).sum(1)


def _rows(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(student, teacher)
    return student.flatten(1).to(dtype), teacher.flatten(1).to(dtype)
