"""Kernels of embeddings and their congruence, in plain PyTorch: the specification of ``correlation_congruence``."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...types import KernelName
from ..patches.reference import unit_rows
from ..row_masks import pairs, zeroed
from ..shapes import accumulation_dtype

EPS = 1e-12  # an embedding of this norm or less is the zero vector


class Kernel(NamedTuple):
    """A correlation metric κ(x, y) between two embeddings (CCKD section 3.4)."""

    name: KernelName
    gamma: float
    order: int


def correlation_congruence(
    student: Tensor,
    teacher: Tensor,
    kernel: Kernel,
    normalize: bool,
    scale: float,
    mask: Tensor | None = None,
) -> Tensor:
    """``scale · Σ_ij (κ(s_i, s_j) − κ(t_i, t_j))²`` (CCKD Eq. 6), over the rows that the mask counts."""
    if mask is not None:
        student, teacher = zeroed(mask, (student, teacher))
    dtype = accumulation_dtype(student, teacher)
    x, y = (rows_of(embeddings, dtype, normalize) for embeddings in (student, teacher))
    differences = kernel_matrix(x, x, kernel) - kernel_matrix(y, y, kernel)
    if mask is not None:
        differences = differences.masked_fill(~pairs(mask), 0)
    return scale * differences.square().sum()


def rows_of(embeddings: Tensor, dtype: torch.dtype, normalize: bool) -> Tensor:
    rows = embeddings.to(dtype)
    return unit_rows(rows, EPS) if normalize else rows


def kernel_matrix(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    """Return κ(x_i, y_j) for all rows of ``x`` and of ``y``."""
    if kernel.name == "mmd":
        return (x.mean(1)[:, None] - y.mean(1)).abs()
    if kernel.name == "rbf":
        return (-kernel.gamma * _squared_distances(x, y)).exp()
    products = x @ y.T
    return products if kernel.name == "bilinear" else _taylor(products, kernel.gamma, kernel.order)


def _taylor(products: Tensor, gamma: float, order: int) -> Tensor:
    """``exp(−2γ) Σ_{p≤P} (2γ)^p / p! · g^p`` (Eq. 9), by Horner's rule from the innermost factor."""
    series = 1 + 0 * products  # NaN stays NaN at order 0 too
    for p in range(order, 0, -1):
        series = 1 + series * products * (2 * gamma / p)
    return _exp(-2 * gamma, series) * series


def nonzero_terms(gamma: float, order: int) -> int:
    """How many terms exp(−2γ) (2γ)^p / p!, p = 1, ..., order, are not 0 in float64: kernels loop over no others."""
    term, count = math.exp(-2 * gamma), 0
    while count < order and (term := term * 2 * gamma / (count + 1)) != 0:
        count += 1
    return count


def _exp(number: float, like: Tensor) -> float | Tensor:
    """Return the exponential of a number. torch.compile may not know the number, and takes it as a tensor."""
    if torch.compiler.is_dynamo_compiling():
        return like.new_full((), number, dtype=torch.float64).exp()
    return math.exp(number)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return ``‖x_i − y_j‖²`` of rows moved to their common centre, where the products cancel less."""
    centre = x.detach().mean(0)
    x, y = x - centre, y - centre
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * (x @ y.T)).clamp(min=0)
