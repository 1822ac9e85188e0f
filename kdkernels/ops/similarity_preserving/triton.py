"""Triton kernels of ``similarity_preserving``.

Gram form: the kernels of ``gram`` compute G = X Xᵀ and H = Y Yᵀ. The slopes S of the loss overwrite them. The kernels
of ``gram`` then compute the gradients S·X and S·Y. Feature form: the products XᵀX, YᵀY and XᵀY of ``congruence`` give
each row's contribution and gradient.

Both forms reduce a row to the inverse norms r and s of its similarities, and to 1 − cos in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...native import allows_tf32
from ..congruence.triton import _deep_product, _precision, _product
from ..gram.triton import apply, multiply
from ..operator import in_triton
from ..planes import store_planes
from ..shapes import accumulation_dtype
from ..tuning import LIBRARY_TILE
from ..tuning import SIMILARITY_PRESERVING_TILE as TILE
from . import fake
from .reference import EPS

Gradients = Sequence[Tensor | None]


@in_triton(fake.similarity_preserving)
def _launch(
    student: Tensor, teacher: Tensor, scale: float, feature: bool, grad_student: bool, grad_teacher: bool
) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(student, teacher)
    gradients = [
        x.new_empty(x.shape if wanted else (0,), dtype=dtype)
        for x, wanted in ((student, grad_student), (teacher, grad_teacher))
    ]
    wanted = [
        gradient.view(len(gradient), -1) if want else None
        for gradient, want in zip(gradients, (grad_student, grad_teacher), strict=True)
    ]
    with torch.cuda.device_of(student):
        if feature:
            x, y = (features.flatten(1).to(dtype).contiguous() for features in (student, teacher))
            total = _feature_form(x, y, scale, wanted)
        else:
            total = _gram_form(student, teacher, scale, wanted)
    return total.to(dtype), *gradients


def _gram_form(student: Tensor, teacher: Tensor, scale: float, gradients: Gradients) -> Tensor:
    g, h = multiply([student, teacher], allows_tf32())
    rows = len(g)
    inverse_x, inverse_y, defects, _ = reduce_rows(g, g, h, h, g)
    grid = tuple(triton.cdiv(rows, block) for block in TILE)
    partials: Tensor = g.new_empty(grid, dtype=torch.float64)
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
    """Compute the loss from ``(X Xᵀ)_i · (Y Yᵀ)_i = x_iᵀ (XᵀY) y_i``."""
    across = _inner(x, y)
    of_x, of_y = (_times(rows, _inner(rows, rows)) for rows in (x, y))
    inverse_x, inverse_y, defects, terms = reduce_rows(of_x, x, of_y, y, _times(x, across))
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
    """Return AᵀB. Its depth is the batch."""
    return _deep_product(a.mT[None], b[None])[0][0]


def _times(a: Tensor, b: Tensor) -> Tensor:
    result = a.new_empty(len(a), b.shape[1])
    _product(a[None], b[None], out=result[None], precision=_precision(a, feature=True))
    return result


def reduce_rows(
    left_x: Tensor, right_x: Tensor, left_y: Tensor, right_y: Tensor, left_across: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the inverse norms r and s of the rows, 1 − cos, and their contribution to the loss.

    The squared norms of a row are the dot products of the first two arguments, and of the next two. The product with
    the other network's row is the dot product of the last argument with ``right_y``.
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
    """Return the dot products of the rows of two matrices of the same shape, in float64."""
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
    """Return the inverse norm, 0 for a zero row, and NaN for a row that is not finite."""
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
    """A tile of both Gram matrices. It sums the squared differences, and is overwritten by the slopes of the loss."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < rows)[:, None] & (column < rows)[None, :]
    offsets = row.to(tl.int64)[:, None] * rows + column.to(tl.int64)[None, :]
    g = tl.load(g_ptr + offsets, mask=inside, other=0)
    h = tl.load(h_ptr + offsets, mask=inside, other=0)
    factor = tl.full((), factor, tl.float64).to(g.dtype)

    # Entry (i, j) belongs to row i and, because the matrices are symmetric, to row j.
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


def compare_strips(
    g: Tensor,
    h: Tensor,
    inverse_x: Tensor,
    inverse_y: Tensor,
    defects: Tensor,
    slopes: list[Tensor | None],
    first: int,
    factor: float,
) -> Tensor:
    """Process strips of both Gram matrices from the diagonal on, which matrix products have computed: height x width.

    Returns the parts of the loss without its factor, and writes the slopes.
    """
    height, width = g.shape
    rows, columns = LIBRARY_TILE
    grid = triton.cdiv(height, rows), triton.cdiv(width, columns)
    partials = g.new_empty(grid, dtype=torch.float64)
    planes = [s.shape[1] if s is not None and s.dtype == torch.bfloat16 else 0 for s in slopes]
    with torch.cuda.device_of(g):
        _strips_kernel[grid](
            g,
            h,
            *(strip if out is None else out for strip, out in zip((g, h), slopes, strict=True)),
            inverse_x,
            inverse_y,
            defects,
            partials,
            height,
            width,
            first,
            factor,
            STORE_X=slopes[0] is not None,
            STORE_Y=slopes[1] is not None,
            PLANES_X=planes[0],
            PLANES_Y=planes[1],
            BLOCK_ROWS=rows,
            BLOCK_COLUMNS=columns,
        )
    return partials


@triton.jit
def _strips_kernel(
    g_ptr,
    h_ptr,
    slopes_x_ptr,
    slopes_y_ptr,
    inverse_x_ptr,
    inverse_y_ptr,
    defects_ptr,
    partials_ptr,
    height,
    width,
    first,
    factor: tl.float64,
    STORE_X: tl.constexpr,
    STORE_Y: tl.constexpr,
    PLANES_X: tl.constexpr,
    PLANES_Y: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < height)[:, None] & (column < width)[None, :]
    offsets = row.to(tl.int64)[:, None] * width + column[None, :]
    g = tl.load(g_ptr + offsets, mask=inside, other=0)
    h = tl.load(h_ptr + offsets, mask=inside, other=0)
    factor = tl.full((), factor, tl.float64).to(g.dtype)
    r = tl.load(inverse_x_ptr + first + row, mask=row < height, other=0)[:, None]
    s = tl.load(inverse_y_ptr + first + row, mask=row < height, other=0)[:, None]
    defect = tl.load(defects_ptr + first + row, mask=row < height, other=0)[:, None]
    r_too = tl.load(inverse_x_ptr + first + column, mask=column < width, other=0)[None, :]
    s_too = tl.load(inverse_y_ptr + first + column, mask=column < width, other=0)[None, :]
    defect_too = tl.load(defects_ptr + first + column, mask=column < width, other=0)[None, :]
    difference = r * g - s * h
    difference_too = r_too * g - s_too * h
    squares = difference.to(tl.float64) * difference.to(tl.float64)
    # Entries beyond the strip's own rows also stand for the entries on the other side of the diagonal.
    squares_too = difference_too.to(tl.float64) * difference_too.to(tl.float64)
    squares += tl.where((column >= height)[None, :], squares_too, 0)
    tl.store(partials_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(squares))
    size = tl.cast(height, tl.int64) * width
    if STORE_X:
        slope = r * (difference - defect * r * g) + r_too * (difference_too - defect_too * r_too * g)
        store_planes(slopes_x_ptr, offsets, size, factor * slope, inside, PLANES_X)
    if STORE_Y:
        slope = s * (difference + defect * s * h) + s_too * (difference_too + defect_too * s_too * h)
        store_planes(slopes_y_ptr, offsets, size, -factor * slope, inside, PLANES_Y)
