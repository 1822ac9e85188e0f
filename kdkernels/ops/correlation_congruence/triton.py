"""Triton kernels of ``correlation_congruence``: the tiles of ``congruence``, each network's apart, and an epilogue.

Over strips I of rows, with products X_I Xᵀ and Y_I Yᵀ in registers, the epilogue makes values κ and slopes κ′;
strips S = (κ(X) − κ(Y)) ∘ κ′(X) give the gradient: by products with rows, or by the sums of their rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from ...native import accumulation_dtype
from ..autograd import scaled
from ..congruence.plan import Coefficients, Plan
from ..congruence.triton import _multiply, _precision, _product, _strip_rows, _tile
from ..congruence.triton import congruence as bilinear
from ..patches import patches
from .reference import EPS, KERNELS, Kernel

TAYLOR_RBF, RBF, _, MMD = range(len(KERNELS))


def correlation_congruence(
    student: Tensor, teacher: Tensor, kernel: Kernel, normalize: bool, scale: float, plan: Plan
) -> Tensor:
    dtype = accumulation_dtype(student, teacher)
    x, y = (_rows(embeddings, dtype, normalize, kernel.name) for embeddings in (student, teacher))
    if kernel.name == "bilinear":
        return bilinear(x, y, 1, Coefficients(scale, 0.0, 0.0, 0.0), plan)
    return _Comparison.apply(x, y, KERNELS.index(kernel.name), float(kernel.gamma), kernel.order, scale)[0]


def _rows(embeddings: Tensor, dtype: torch.dtype, normalize: bool, kernel: str) -> Tensor:
    if normalize:
        return patches(embeddings[:, :, None, None], 1, eps=EPS, backend="triton").to(dtype)
    rows = embeddings.to(dtype)
    # About their common centre less of the products cancels in distances.
    return rows - rows.detach().mean(0) if kernel == "rbf" else rows


class _Comparison(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, kernel: int, gamma: float, order: int, scale: float):
        ctx.set_materialize_grads(False)
        needed = ctx.needs_input_grad[:2]
        loss, *gradients = torch.ops.kdkernels_triton.kernel_congruence(x, y, kernel, gamma, order, scale, *needed)
        ctx.save_for_backward(*gradients)
        return loss, *gradients

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        gradients = (
            scaled(grad, gradient, gradient.dtype) if needed else None
            for needed, gradient in zip(ctx.needs_input_grad, ctx.saved_tensors, strict=False)
        )
        return *gradients, None, None, None, None


library.define(
    "kdkernels_triton::kernel_congruence",
    "(Tensor x, Tensor y, int kernel, float gamma, SymInt order, float scale, bool grad_x, bool grad_y)"
    " -> (Tensor loss, Tensor grad_x, Tensor grad_y)",
)


@library.register_fake("kdkernels_triton::kernel_congruence")
def _allocate(x, y, kernel, gamma, order, scale, grad_x, grad_y):
    return x.new_empty(()), x.new_empty(x.shape if grad_x else 0), x.new_empty(y.shape if grad_y else 0)


@library.impl("kdkernels_triton::kernel_congruence", "CompositeExplicitAutograd")
def _launch(x, y, kernel, gamma, order, scale, grad_x, grad_y):
    _, *gradients = _allocate(x, y, kernel, gamma, order, scale, grad_x, grad_y)
    rows = x.shape[0]
    height = min(_strip_rows(1, rows), rows) if grad_x or grad_y else rows
    memory = [x.new_empty(height, rows) if wanted else None for wanted in (grad_x, grad_y)]
    terms = [_terms(z, kernel) for z in (x, y)]
    partials = []
    with torch.cuda.device_of(x):
        for first in range(0, rows, height):
            mine = slice(first, first + height)
            strips = [None if strip is None else strip[: rows - first] for strip in memory]
            partials.append(_compare(x, y, *terms, *strips, mine, kernel, gamma, order, scale))
            for strip, z, gradient, factor in zip(strips, (x, y), gradients, (4 * scale, -4 * scale), strict=True):
                if strip is not None:
                    _apply(strip, z, gradient[mine], mine, kernel, factor)
    return torch.cat(partials).sum().to(x.dtype), *gradients


def _terms(rows: Tensor, kernel: int) -> Tensor:
    """What a row brings to its pairs besides products: its square, or its mean."""
    if kernel == RBF:
        return rows.square().sum(1)
    return rows.mean(1) if kernel == MMD else rows.new_empty(0)


def _apply(strip: Tensor, rows: Tensor, out: Tensor, mine: slice, kernel: int, factor: float) -> None:
    """The gradient of the strip's rows from their slopes."""
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
    """The loss of a strip of rows, in parts; their slopes go to the strips that are wanted."""
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
        num_warps=max(1, min(block_rows * block_columns // 512, 8)),  # two sums in registers
    )
    return partials


@triton.jit
def _correlate(products, terms_ptr, row, column, rows, order, gamma, KERNEL: tl.constexpr):
    """Values of a kernel and their slopes: in the products, or in the rows' means for MMD.

    The constant of the Taylor series is left out, since it cancels in differences.
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
    """A tile of both kernel matrices: the squares of its difference, and the slopes of the loss."""
    program = tl.program_id(0)
    tiles_across = tl.cdiv(rows, BLOCK_COLUMNS)
    tile_row = program // tiles_across * BLOCK_ROWS
    tile_column = program % tiles_across * BLOCK_COLUMNS
    strip_row = tile_row + tl.arange(0, BLOCK_ROWS)
    row = first_row + strip_row
    column = tile_column + tl.arange(0, BLOCK_COLUMNS)
    if SYMMETRIC:
        # Tiles below the diagonal have nothing to do: those above it count twice.
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
