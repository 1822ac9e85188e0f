"""Triton kernels of ``correlation_congruence``: the tiles of ``congruence``, separately per network, and an epilogue.

For strips I of rows, with the products X_I Xᵀ and Y_I Yᵀ in registers, the epilogue computes values κ and slopes κ′.
Strips S = (κ(X) − κ(Y)) ∘ κ′(X) give the gradient, from products with rows or from row sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...types import KERNELS
from ..congruence.triton import _launch as bilinear
from ..congruence.triton import _multiply, _precision, _product, _strip_rows, _tile
from ..operator import in_triton
from ..patches.triton import _launch as pack
from ..patches.triton import _launch_backward as unpack
from ..planes import store_planes
from ..shapes import accumulation_dtype
from ..tuning import LIBRARY_TILE
from . import fake
from .reference import EPS, nonzero_terms

TAYLOR_RBF, RBF, BILINEAR, MMD = range(len(KERNELS))


@in_triton(fake.correlation_congruence)
def _launch(
    student: Tensor,
    teacher: Tensor,
    kernel: int,
    gamma: float,
    order: int,
    normalize: bool,
    scale: float,
    plan: list[int],
    grad_student: bool,
    grad_teacher: bool,
    tf32: bool = False,
) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(student, teacher)
    wanted = grad_student, grad_teacher
    rows, norms = zip(*(_rows(x, dtype, normalize, kernel) for x in (student, teacher)), strict=True)
    x, y = rows
    if kernel == BILINEAR:
        loss, *grads = bilinear(x, y, 1, [scale, 0.0, 0.0, 0.0], plan, *wanted, tf32)
    else:
        loss, *grads = _congruence(x, y, kernel, gamma, nonzero_terms(gamma, order), scale, *wanted)
    if normalize:
        grads = [
            _through_norms(*of_one) if want else of_one[0]
            for want, of_one in zip(wanted, zip(grads, rows, norms, strict=True), strict=True)
        ]
    return loss, *grads


def _rows(embeddings: Tensor, dtype: torch.dtype, normalize: bool, kernel: int) -> tuple[Tensor, Tensor | None]:
    """The rows that are compared, and the norms that they were divided by."""
    if normalize:
        rows, norms = pack(embeddings[:, :, None, None], 1, None, None, False, EPS)
        return rows.to(dtype), norms.to(dtype)
    rows = embeddings.to(dtype)
    # Around their common centre, the products cancel less in distances.
    return (rows - rows.mean(0) if kernel == RBF else rows), None


def _through_norms(grad: Tensor, rows: Tensor, norms: Tensor) -> Tensor:
    """The gradient to embeddings from the gradient to their unit rows."""
    maps: Tensor = unpack(grad, rows, norms, [rows.shape[1], 1, 1, False], 1, None, None, False)
    return maps[:, :, 0, 0]


def _congruence(
    x: Tensor, y: Tensor, kernel: int, gamma: float, order: int, scale: float, grad_x: bool, grad_y: bool
) -> tuple[Tensor, ...]:
    gradients = [rows.new_empty(rows.shape if wanted else (0,)) for rows, wanted in ((x, grad_x), (y, grad_y))]
    rows = x.shape[0]
    height = min(_strip_rows(1, rows), rows) if grad_x or grad_y else rows
    memory = [x.new_empty(height, rows) if wanted else None for wanted in (grad_x, grad_y)]
    terms_x, terms_y = (_terms(z, kernel) for z in (x, y))
    partials = []
    with torch.cuda.device_of(x):
        for first in range(0, rows, height):
            mine = slice(first, first + height)
            strips = strip_x, strip_y = [None if strip is None else strip[: rows - first] for strip in memory]
            partials.append(_compare(x, y, terms_x, terms_y, strip_x, strip_y, mine, kernel, gamma, order, scale))
            for strip, z, gradient, factor in zip(strips, (x, y), gradients, (4 * scale, -4 * scale), strict=True):
                if strip is not None:
                    _apply(strip, z, gradient[mine], mine, kernel, factor)
    return torch.cat(partials).sum().to(x.dtype), *gradients


def _terms(rows: Tensor, kernel: int) -> Tensor:
    """Return the term of each row besides products: its square or its mean."""
    if kernel == RBF:
        return rows.square().sum(1)
    return rows.mean(1) if kernel == MMD else rows.new_empty(0)


def _apply(strip: Tensor, rows: Tensor, out: Tensor, mine: slice, kernel: int, factor: float) -> None:
    """Compute the gradient to the strip's rows from their slopes."""
    if kernel == MMD:
        out.copy_((strip.sum(1, keepdim=True) * (factor / rows.shape[1])).expand_as(out))
        return
    _product(strip[None], rows[None], out=out[None], scale=factor, precision=_precision(rows))
    if kernel == RBF:
        out.addcmul_(rows[mine], strip.sum(1, keepdim=True), value=-factor)


def _compare(
    x: Tensor,
    y: Tensor,
    terms_x: Tensor,
    terms_y: Tensor,
    strip_x: Tensor | None,
    strip_y: Tensor | None,
    mine: slice,
    kernel: int,
    gamma: float,
    order: int,
    scale: float,
) -> Tensor:
    """Compute the parts of the loss of a strip of rows. The slopes go to the wanted strips."""
    rows, depth_x, depth_y = x.shape[0], x.shape[1], y.shape[1]
    height = min(mine.stop, rows) - mine.start
    precision = _precision(x)
    block_rows, block_columns, block_depth = _tile(x.dtype, height, rows, precision)
    programs = triton.cdiv(height, block_rows) * triton.cdiv(rows, block_columns)
    partials = x.new_empty(programs, dtype=torch.float64)
    _kernels_kernel[(programs,)](
        x,
        y,
        terms_x,
        terms_y,
        x if strip_x is None else strip_x,
        x if strip_y is None else strip_y,
        partials,
        *x.stride(),
        *y.stride(),
        mine.start,
        rows,
        0 if kernel == MMD else depth_x,
        0 if kernel == MMD else depth_y,
        order,
        gamma,
        scale,
        KERNEL=kernel,
        STORE_X=strip_x is not None,
        STORE_Y=strip_y is not None,
        SYMMETRIC=strip_x is None and strip_y is None,
        PRECISION=precision,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        BLOCK_DEPTH=block_depth,
        num_warps=max(1, min(block_rows * block_columns // 512, 8)),  # there are two sums in registers
    )
    return partials


@triton.jit
def _correlate(products, terms_ptr, row, column, rows, order, gamma, KERNEL: tl.constexpr):
    """Return the values of a kernel and their slopes with respect to the products, or to the rows' means for MMD.

    The constant of the Taylor series is left out, because it cancels in differences.
    """
    dtype: tl.constexpr = products.dtype
    if KERNEL == 0:  # TAYLOR_RBF
        value = products * 0
        slope = products * 0
        for i in range(order):
            p = order - i
            factor = (2 * gamma / p).to(dtype)
            slope = factor * (1 + value + products * slope)
            value = factor * products * (1 + value)
        constant = tl.exp2(-2 * gamma * 1.4426950408889634).to(dtype)
        value *= constant
        slope *= constant
    elif KERNEL == 2:  # BILINEAR
        value = products
        slope = products * 0 + 1
    else:
        row_terms = tl.load(terms_ptr + row, mask=row < rows, other=0)[:, None]
        column_terms = tl.load(terms_ptr + column, mask=column < rows, other=0)[None, :]
        difference = row_terms - column_terms
        if KERNEL == 1:  # RBF
            distance = row_terms + column_terms - 2 * products
            distance = tl.where(distance < 0, 0, distance)
            distance = tl.where(row[:, None] == column[None, :], difference, distance)
            value = tl.exp2(distance * (-gamma * 1.4426950408889634).to(dtype))
            slope = value * (2 * gamma).to(dtype)
        else:  # MMD
            value = tl.abs(difference)
            slope = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, 0.0)).to(dtype)
    return value, slope


@triton.jit
def _kernels_kernel(
    x_ptr,
    y_ptr,
    terms_x_ptr,
    terms_y_ptr,
    out_x_ptr,
    out_y_ptr,
    partials_ptr,
    x_row_stride,
    x_stride,
    y_row_stride,
    y_stride,
    first_row,
    rows,
    depth_x,
    depth_y,
    order,
    gamma: tl.float64,
    scale: tl.float64,
    KERNEL: tl.constexpr,
    STORE_X: tl.constexpr,
    STORE_Y: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """A tile of both kernel matrices. It sums the squared differences, and computes the slopes of the loss."""
    program = tl.program_id(0)
    tiles_across = tl.cdiv(rows, BLOCK_COLUMNS)
    tile_row = program // tiles_across * BLOCK_ROWS
    tile_column = program % tiles_across * BLOCK_COLUMNS
    strip_row = tile_row + tl.arange(0, BLOCK_ROWS)
    row = first_row + strip_row
    column = tile_column + tl.arange(0, BLOCK_COLUMNS)
    if SYMMETRIC:
        # Tiles below the diagonal do nothing, because tiles above it count twice.
        above = tile_row < tile_column + BLOCK_COLUMNS
        depth_x = tl.where(above, depth_x, 0)
        depth_y = tl.where(above, depth_y, 0)

    dtype: tl.constexpr = x_ptr.dtype.element_ty
    zero = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype)
    of_x = _multiply(
        zero, x_ptr, x_ptr, x_row_stride, x_stride, x_stride, x_row_stride,
        row, column, rows, rows, depth_x, PRECISION, BLOCK_DEPTH,
    )  # fmt: skip
    of_y = _multiply(
        zero, y_ptr, y_ptr, y_row_stride, y_stride, y_stride, y_row_stride,
        row, column, rows, rows, depth_y, PRECISION, BLOCK_DEPTH,
    )  # fmt: skip
    diagonal = row[:, None] == column[None, :]
    gamma = tl.full((), gamma, tl.float64)
    value_x, slope_x = _correlate(of_x, terms_x_ptr, row, column, rows, order, gamma, KERNEL)
    value_y, slope_y = _correlate(of_y, terms_y_ptr, row, column, rows, order, gamma, KERNEL)

    inside = (row < rows)[:, None] & (column < rows)[None, :]
    difference = tl.where(inside, value_x - value_y, 0)
    squares = difference.to(tl.float64) * difference.to(tl.float64)
    if SYMMETRIC:
        squares = tl.where(row[:, None] <= column[None, :], tl.where(diagonal, squares, 2 * squares), 0)
    tl.store(partials_ptr + program, tl.sum(squares) * tl.full((), scale, tl.float64))
    offsets = strip_row.to(tl.int64)[:, None] * rows + column.to(tl.int64)[None, :]
    if STORE_X:
        tl.store(out_x_ptr + offsets, difference * slope_x, mask=inside)
    if STORE_Y:
        tl.store(out_y_ptr + offsets, difference * slope_y, mask=inside)


def compare_strips(
    strips: tuple[Tensor, Tensor],
    slopes: list[Tensor | None],
    terms: list[Tensor],
    factors: list[Tensor | None],
    first: int,
    kernel: int,
    gamma: float,
    order: int,
    scale: float,
) -> Tensor:
    """Process strips of both Gram matrices, which matrix products have computed: 1 x height x width.

    Returns the parts of scale·Σ(κ(X) − κ(Y))², and writes the slopes with respect to the products of each network.
    """
    strip_x, strip_y = strips
    _, height, width = strip_x.shape
    rows, columns = LIBRARY_TILE
    programs = triton.cdiv(height, rows) * triton.cdiv(width, columns)
    partials = strip_x.new_empty(programs, dtype=torch.float64)
    written = next((s for s in slopes if s is not None), None)
    with torch.cuda.device_of(strip_x):
        _strips_kernel[(programs,)](
            strip_x,
            strip_y,
            *(strip if out is None else out for strip, out in zip(strips, slopes, strict=True)),
            partials,
            *terms,
            *(strip_x if factor is None else factor for factor in factors),
            height,
            width,
            first,
            order,
            gamma,
            scale,
            KERNEL=kernel,
            FACTORS=factors[0] is not None,
            STORE_X=slopes[0] is not None,
            STORE_Y=slopes[1] is not None,
            PLANES=written.shape[1] if written is not None and written.dtype == torch.bfloat16 else 0,
            BLOCK_ROWS=rows,
            BLOCK_COLUMNS=columns,
        )
    return partials


@triton.jit
def _pair_factors(factors_ptr, row, column, rows):
    of_row = tl.load(factors_ptr + row, mask=row < rows, other=0)[:, None]
    return of_row * tl.load(factors_ptr + column, mask=column < rows, other=0)[None, :]


@triton.jit
def _strips_kernel(
    strip_x_ptr,
    strip_y_ptr,
    slopes_x_ptr,
    slopes_y_ptr,
    partials_ptr,
    terms_x_ptr,
    terms_y_ptr,
    factors_x_ptr,
    factors_y_ptr,
    height,
    width,
    first,
    order,
    gamma: tl.float64,
    scale: tl.float64,
    KERNEL: tl.constexpr,
    FACTORS: tl.constexpr,
    STORE_X: tl.constexpr,
    STORE_Y: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    across = tl.cdiv(width, BLOCK_COLUMNS)
    strip_row = program // across * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    strip_column = program % across * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (strip_row < height)[:, None] & (strip_column < width)[None, :]
    offsets = strip_row.to(tl.int64)[:, None] * width + strip_column[None, :]
    of_x = tl.load(strip_x_ptr + offsets, mask=inside, other=0)
    of_y = tl.load(strip_y_ptr + offsets, mask=inside, other=0)
    row, column, rows = first + strip_row, first + strip_column, first + width
    if FACTORS:
        factor_x = _pair_factors(factors_x_ptr, row, column, rows)
        factor_y = _pair_factors(factors_y_ptr, row, column, rows)
        of_x *= factor_x
        of_y *= factor_y
    gamma = tl.full((), gamma, tl.float64)
    scale = tl.full((), scale, tl.float64)
    value_x, slope_x = _correlate(of_x, terms_x_ptr, row, column, rows, order, gamma, KERNEL)
    value_y, slope_y = _correlate(of_y, terms_y_ptr, row, column, rows, order, gamma, KERNEL)
    difference = tl.where(inside, value_x - value_y, 0)
    # The columns beyond the strip's own rows also stand for the entries on the other side of the diagonal.
    counted = (difference * difference).to(tl.float64) * tl.where(strip_column < height, 1.0, 2.0).to(tl.float64)[
        None, :
    ]
    tl.store(partials_ptr + program, tl.sum(counted) * scale)
    size = tl.cast(height, tl.int64) * width
    difference *= (4 * scale).to(difference.dtype)
    if STORE_X:
        slope = difference * slope_x
        if FACTORS:
            slope *= factor_x
        store_planes(slopes_x_ptr, offsets, size, slope, inside, PLANES)
    if STORE_Y:
        slope = difference * slope_y
        if FACTORS:
            slope *= factor_y
        store_planes(slopes_y_ptr, offsets, size, slope, inside, PLANES)
