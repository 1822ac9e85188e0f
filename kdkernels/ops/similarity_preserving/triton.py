"""Triton kernels of ``similarity_preserving``.

Gram form: the matrices G = X Xᵀ and H = Y Yᵀ by the kernels of ``gram``, overwritten by the slopes S of the loss, whose
products S·X and S·Y, again by those of ``gram``, are the gradients.
Feature form: the products XᵀX, YᵀY and XᵀY of ``congruence``, which give what a row contributes and its gradient.

Both reduce a row to the inverse norms r and s of its similarities and to 1 − cos, which is computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from ...native import accumulation_dtype, allows_tf32
from ..congruence.triton import _deep_product, _precision, _product
from ..gram.triton import apply, multiply
from ..tuning import SIMILARITY_PRESERVING_TILE as TILE
from .reference import EPS

Gradients = Sequence[Tensor | None]

library.define(
    "kdkernels_triton::similarity_preserving",
    "(Tensor student, Tensor teacher, float scale, bool feature, bool grad_student, bool grad_teacher)"
    " -> (Tensor loss, Tensor grad_student, Tensor grad_teacher)",
)


@library.register_fake("kdkernels_triton::similarity_preserving")
def _allocate(student, teacher, scale, feature, grad_student, grad_teacher):
    dtype = accumulation_dtype(student, teacher)
    of_student, of_teacher = (
        features.new_empty(features.shape if wanted else (0,), dtype=dtype)
        for features, wanted in ((student, grad_student), (teacher, grad_teacher))
    )
    return student.new_empty((), dtype=dtype), of_student, of_teacher


@library.impl("kdkernels_triton::similarity_preserving", ("CPU", "CUDA"))
def _launch(student, teacher, scale, feature, grad_student, grad_teacher):
    loss, *gradients = _allocate(student, teacher, scale, feature, grad_student, grad_teacher)
    wanted = [
        gradient.view(len(gradient), -1) if want else None
        for gradient, want in zip(gradients, (grad_student, grad_teacher), strict=True)
    ]
    with torch.cuda.device_of(student):
        if feature:
            x, y = (features.flatten(1).to(loss.dtype).contiguous() for features in (student, teacher))
            total = _feature_form(x, y, scale, wanted)
        else:
            total = _gram_form(student, teacher, scale, wanted)
    return total.to(loss.dtype), *gradients


def _gram_form(student: Tensor, teacher: Tensor, scale: float, gradients: Gradients) -> Tensor:
    g, h = multiply([student, teacher], allows_tf32())
    rows = len(g)
    inverse_x, inverse_y, defects, _ = _reduce_rows(g, g, h, h, g)
    grid = tuple(triton.cdiv(rows, block) for block in TILE)
    partials = g.new_empty(grid, dtype=torch.float64)
    _slopes_kernel[grid](
        g,
        h,
        inverse_x,
        inverse_y,
        defects,
        partials,
        rows,
        2 * scale,
        STORE_X=gradients[0] is not None,
        STORE_Y=gradients[1] is not None,
        BLOCK_ROWS=TILE[0],
        BLOCK_COLUMNS=TILE[1],
    )
    for slopes, features, gradient in zip((g, h), (student, teacher), gradients, strict=True):
        if gradient is not None:
            apply(slopes[None], [features], [gradient], allows_tf32())
    return scale * partials.sum()


def _feature_form(x: Tensor, y: Tensor, scale: float, gradients: Gradients) -> Tensor:
    """By ``(X Xᵀ)_i · (Y Yᵀ)_i = x_iᵀ (XᵀY) y_i``."""
    across = _inner(x, y)
    of_x, of_y = (_times(rows, _inner(rows, rows)) for rows in (x, y))
    inverse_x, inverse_y, defects, terms = _reduce_rows(of_x, x, of_y, y, _times(x, across))
    cosines, cross = (1 - defects)[:, None], (inverse_x * inverse_y)[:, None]
    for gradient, a, b, of_a, b_to_a, inverse in (
        (gradients[0], x, y, of_x, across.mT, inverse_x[:, None]),
        (gradients[1], y, x, of_y, across, inverse_y[:, None]),
    ):
        if gradient is None:
            continue
        own = cosines * inverse**2
        sums = (part[None] for part in (a, _inner(a, own * a), b, _inner(b, cross * a)))
        _product(*sums, out=gradient[None], scale=2 * scale, precision=_precision(x, feature=True))
        gradient.add_(own * of_a - cross * _times(b, b_to_a), alpha=2 * scale)
    return scale * terms.sum()


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """AᵀB, whose depth is the batch."""
    return _deep_product(a.mT[None], b[None])[0][0]


def _times(a: Tensor, b: Tensor) -> Tensor:
    result = a.new_empty(len(a), b.shape[1])
    _product(a[None], b[None], out=result[None], precision=_precision(a, feature=True))
    return result


def _reduce_rows(
    left_x: Tensor, right_x: Tensor, left_y: Tensor, right_y: Tensor, left_across: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inverse norms r and s of the rows, 1 − cos, and what they add to the loss.

    A row's squared norms are the dot products of the first two arguments and of the next two, its product with the
    other network's row that of the last with ``right_y``.
    """
    rows = len(left_x)
    inverse_x, inverse_y, defects = left_x.new_empty(3, rows)
    terms = left_x.new_empty(rows, dtype=torch.float64)
    _rows_kernel[(triton.cdiv(rows, TILE[0]),)](
        left_x,
        right_x,
        left_y,
        right_y,
        left_across,
        inverse_x,
        inverse_y,
        defects,
        terms,
        rows,
        right_x.shape[1],
        right_y.shape[1],
        EPS,
        BLOCK_ROWS=TILE[0],
        BLOCK_COLUMNS=TILE[1],
    )
    return inverse_x, inverse_y, defects, terms


@triton.jit
def _row_products(a_ptr, b_ptr, row, rows, length, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Dot products of the rows of two matrices of the same shape, in float64."""
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float64)
    for start in range(0, length, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        inside = (row < rows)[:, None] & (column < length)[None, :]
        offsets = row.to(tl.int64)[:, None] * length + column[None, :]
        a = tl.load(a_ptr + offsets, mask=inside, other=0).to(tl.float64)
        total += a * tl.load(b_ptr + offsets, mask=inside, other=0).to(tl.float64)
    return tl.sum(total, 1)


@triton.jit
def _inverse_norm(squares, eps: tl.float64):
    """0 for a row that resembles nothing, NaN for one that is not finite."""
    eps = tl.full((), eps, tl.float64)
    squares = tl.where(squares < float("inf"), squares, float("nan"))
    dead = squares <= eps * eps
    return tl.where(dead, 0.0, 1 / tl.sqrt(tl.where(dead, 1.0, squares)))


@triton.jit
def _rows_kernel(
    left_x_ptr,
    right_x_ptr,
    left_y_ptr,
    right_y_ptr,
    left_across_ptr,
    inverse_x_ptr,
    inverse_y_ptr,
    defects_ptr,
    terms_ptr,
    rows,
    length_x,
    length_y,
    eps: tl.float64,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    squares_x = _row_products(left_x_ptr, right_x_ptr, row, rows, length_x, BLOCK_ROWS, BLOCK_COLUMNS)
    squares_y = _row_products(left_y_ptr, right_y_ptr, row, rows, length_y, BLOCK_ROWS, BLOCK_COLUMNS)
    products = _row_products(left_across_ptr, right_y_ptr, row, rows, length_y, BLOCK_ROWS, BLOCK_COLUMNS)
    r = _inverse_norm(squares_x, eps)
    s = _inverse_norm(squares_y, eps)
    cosine = r * s * products
    alive = (r != 0).to(tl.float64) + (s != 0).to(tl.float64)
    dtype: tl.constexpr = inverse_x_ptr.dtype.element_ty
    tl.store(inverse_x_ptr + row, r.to(dtype), mask=row < rows)
    tl.store(inverse_y_ptr + row, s.to(dtype), mask=row < rows)
    tl.store(defects_ptr + row, (1 - cosine).to(dtype), mask=row < rows)
    tl.store(terms_ptr + row, alive - 2 * cosine, mask=row < rows)


@triton.jit
def _slopes_kernel(
    g_ptr,
    h_ptr,
    inverse_x_ptr,
    inverse_y_ptr,
    defects_ptr,
    partials_ptr,
    rows,
    factor: tl.float64,
    STORE_X: tl.constexpr,
    STORE_Y: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """A tile of both Gram matrices: the squares of its difference, and in its place the slopes of the loss."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < rows)[:, None] & (column < rows)[None, :]
    offsets = row.to(tl.int64)[:, None] * rows + column.to(tl.int64)[None, :]
    g = tl.load(g_ptr + offsets, mask=inside, other=0)
    h = tl.load(h_ptr + offsets, mask=inside, other=0)
    factor = tl.full((), factor, tl.float64).to(g.dtype)

    # Entry (i, j) is one of row i and, the matrices being symmetric, one of row j.
    r = tl.load(inverse_x_ptr + row, mask=row < rows, other=0)[:, None]
    s = tl.load(inverse_y_ptr + row, mask=row < rows, other=0)[:, None]
    defect = tl.load(defects_ptr + row, mask=row < rows, other=0)[:, None]
    difference = r * g - s * h
    wide = difference.to(tl.float64)
    tl.store(partials_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(wide * wide))

    r_too = tl.load(inverse_x_ptr + column, mask=column < rows, other=0)[None, :]
    s_too = tl.load(inverse_y_ptr + column, mask=column < rows, other=0)[None, :]
    defect_too = tl.load(defects_ptr + column, mask=column < rows, other=0)[None, :]
    difference_too = r_too * g - s_too * h
    if STORE_X:
        slope = r * (difference - defect * r * g) + r_too * (difference_too - defect_too * r_too * g)
        tl.store(g_ptr + offsets, factor * slope, mask=inside)
    if STORE_Y:
        slope = s * (difference + defect * s * h) + s_too * (difference_too + defect_too * s_too * h)
        tl.store(h_ptr + offsets, -factor * slope, mask=inside)
