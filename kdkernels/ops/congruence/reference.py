"""The difference of the correlations of two sets of rows, in plain PyTorch: the specification of ``congruence``."""

from __future__ import annotations

import torch
from torch import Tensor

from .plan import Coefficients


def gram_form(x: Tensor, y: Tensor, positions: int, coefficients: Coefficients) -> Tensor:
    """Sum the squared differences D² = (X Xᵀ − Y Yᵀ)² over each set of pairs."""
    squares = (x @ x.T - y @ y.T).square()
    pairs = squares.view(-1, positions, x.shape[0] // positions, positions)
    return (
        coefficients.full * squares.sum()
        + coefficients.intra * torch.einsum("ipiq->", pairs)
        + coefficients.inter_same * torch.einsum("ipjp->", pairs)
        + coefficients.diagonal * squares.diagonal().sum()
    )


def feature_form(x: Tensor, y: Tensor, positions: int, coefficients: Coefficients) -> Tensor:
    """Return the same sums as ‖XᵀX‖² + ‖YᵀY‖² − 2‖YᵀX‖², without an N x N matrix.

    The three norms nearly cancel for a good student, so they are summed in float64.
    """
    x_cells, y_cells = (rows.view(-1, positions, rows.shape[1]) for rows in (x, y))
    diagonal = (x.double().square().sum(1) - y.double().square().sum(1)).square().sum()
    loss = (
        coefficients.full * _norms(x[None], y[None])
        + coefficients.intra * _norms(x_cells, y_cells)
        + coefficients.inter_same * _norms(x_cells.transpose(0, 1), y_cells.transpose(0, 1))
        + coefficients.diagonal * diagonal
    )
    return loss.to(x.dtype)


def _norms(x: Tensor, y: Tensor) -> Tensor:
    """Sum over the batch of ‖XᵀX‖² + ‖YᵀY‖² − 2‖YᵀX‖²."""

    def squared_norm(a: Tensor, b: Tensor) -> Tensor:
        return (a.transpose(1, 2) @ b).double().square().sum()

    return squared_norm(x, x) + squared_norm(y, y) - 2 * squared_norm(y, x)
