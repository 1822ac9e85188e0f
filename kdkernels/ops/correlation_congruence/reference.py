"""Kernels of embeddings and their congruence, in plain PyTorch: the specification of ``correlation_congruence``."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...native import accumulation_dtype
from ..patches.reference import unit_rows

KERNELS = ("taylor_rbf", "rbf", "bilinear", "mmd")
EPS = 1e-12  # embeddings of this norm or less are the zero vector


class Kernel(NamedTuple):
    """A correlation metric κ(x, y) between two embeddings (CCKD section 3.4)."""

    name: str
    gamma: float
    order: int


def correlation_congruence(student: Tensor, teacher: Tensor, kernel: Kernel, normalize: bool, scale: float) -> Tensor:
    """``scale · Σ_ij (κ(s_i, s_j) − κ(t_i, t_j))²`` (CCKD Eq. 6)."""
    dtype = accumulation_dtype(student, teacher)
    x, y = (rows_of(embeddings, dtype, normalize) for embeddings in (student, teacher))
    return scale * (kernel_matrix(x, x, kernel) - kernel_matrix(y, y, kernel)).square().sum()


def rows_of(embeddings: Tensor, dtype: torch.dtype, normalize: bool) -> Tensor:
    rows = embeddings.to(dtype)
    return unit_rows(rows, EPS) if normalize else rows


def kernel_matrix(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    """κ(x_i, y_j) for all rows of ``x`` and of ``y``."""
    if kernel.name == "mmd":
        return (x.mean(1)[:, None] - y.mean(1)).abs()
    if kernel.name == "rbf":
        return (-kernel.gamma * _squared_distances(x, y)).exp()
    products = x @ y.T
    return products if kernel.name == "bilinear" else _taylor(products, kernel.gamma, kernel.order)


def _taylor(products: Tensor, gamma: float, order: int) -> Tensor:
    """``exp(−2γ) Σ_{p≤P} (2γ)^p / p! · g^p`` (Eq. 9), by Horner's rule from the innermost factor."""
    series = 1 + 0 * products  # what is not a number stays so at order 0 too
    for p in range(order, 0, -1):
        series = 1 + series * products * (2 * gamma / p)
    return math.exp(-2 * gamma) * series


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """``‖x_i − y_j‖²`` of rows moved to their common centre, where less of the products cancels."""
    centre = x.detach().mean(0)
    x, y = x - centre, y - centre
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * (x @ y.T)).clamp(min=0)
