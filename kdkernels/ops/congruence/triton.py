"""Triton kernels of ``congruence``: one product of tiles, C = A₁B₁ − A₂B₂, serves every step of both forms.

Gram form, over strips I of rows: S = W∘(X_I Xᵀ − Y_I Yᵀ), whose gradients are 4·S·X and −4·S·Y.
Feature form: the norms of P = XᵀX, T = YᵀY and Q = YᵀX, with gradients 4·(X·P − Y·Q) and 4·(Y·T − X·Qᵀ).

W holds the coefficient of each pair of rows. Sums of squares leave a program in float64 and are added in fixed order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from ...native import allows_tf32
from ..autograd import scaled
from ..tuning import CONGRUENCE_FOLD_BLOCK as FOLD_BLOCK
from ..tuning import CONGRUENCE_PROGRAMS as PROGRAMS
from ..tuning import CONGRUENCE_SPLIT_DEPTH as SPLIT_DEPTH
from ..tuning import CONGRUENCE_TILES as TILES
from .plan import FEATURE, GRAM, Coefficients, Form, Plan, multiply_adds

# A strip of the N x N matrix has at most an eighth of it, in elements at least the first and at most the second number.
STRIP_ELEMENTS = 2**20, 2**24
STRIP_ROWS = 128

View = Callable[[Tensor], Tensor]


def congruence(x: Tensor, y: Tensor, positions: int, coefficients: Coefficients, plan: Plan) -> Tensor:
    sizes = (x.shape[0], positions, x.shape[0] // positions)
    features = [_is_feature(form, size, x, y) for form, size in zip(plan, sizes, strict=True)]
    return _Congruence.apply(x, y, positions, coefficients, features)[0]


def _is_feature(form: Form, rows: int, x: Tensor, y: Tensor) -> bool:
    """Whether a sum is computed in feature space. A mixed form becomes the cheaper of the two pure ones."""
    if form in (GRAM, FEATURE):
        return form == FEATURE
    gram, feature = (
        multiply_adds(pure, rows, x.shape[1], y.shape[1], x.requires_grad, y.requires_grad) for pure in (GRAM, FEATURE)
    )
    return feature < gram


class _Congruence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, positions: int, coefficients: Coefficients, features: list[bool]):
        ctx.set_materialize_grads(False)
        needed = ctx.needs_input_grad[:2]
        loss, *gradients = torch.ops.kdkernels_triton.congruence(x, y, positions, coefficients, features, *needed)
        ctx.save_for_backward(*gradients)
        return loss, *gradients

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        gradients = (
            scaled(grad, gradient, gradient.dtype) if needed else None
            for needed, gradient in zip(ctx.needs_input_grad, ctx.saved_tensors, strict=False)
        )
        return *gradients, None, None, None


library.define(
    "kdkernels_triton::congruence",
    "(Tensor x, Tensor y, SymInt positions, Scalar[] coefficients, bool[] features, bool grad_x, bool grad_y)"
    " -> (Tensor loss, Tensor grad_x, Tensor grad_y)",
)


@library.register_fake("kdkernels_triton::congruence")
def _allocate(x, y, positions, coefficients, features, grad_x, grad_y):
    return x.new_empty(()), x.new_empty(x.shape if grad_x else 0), x.new_empty(y.shape if grad_y else 0)


@library.impl("kdkernels_triton::congruence", "CompositeExplicitAutograd")
def _launch(x, y, positions, coefficients, features, grad_x, grad_y):
    _, *gradients = _allocate(x, y, positions, coefficients, features, grad_x, grad_y)
    sums = _Sums(x, y, *(g if wanted else None for g, wanted in zip(gradients, (grad_x, grad_y), strict=True)))
    full, intra, same, diagonal = coefficients
    over_all, over_image, over_position = features
    whole = bool(full or diagonal) or not any(coefficients)
    with torch.cuda.device_of(x):
        if whole and not over_all:
            sums.add_gram(lambda rows: rows[None], coefficients, positions)
            return sums.loss(), *gradients
        if whole:
            sums.add_feature(lambda rows: rows[None], full, diagonal)
        if intra:
            sums.add(lambda rows: rows.unflatten(0, (-1, positions)), intra, over_image)
        if same:
            sums.add(lambda rows: rows.unflatten(0, (-1, positions)).transpose(0, 1), same, over_position)
        return sums.loss(), *gradients


class _Sums:
    """The loss, in parts, and the gradients, to which one term after the other is added.

    A term is a sum over batches of pairs of rows: its view of the rows has shape batch x rows x d.
    """

    def __init__(self, x: Tensor, y: Tensor, grad_x: Tensor | None, grad_y: Tensor | None) -> None:
        self.x, self.y, self.grad_x, self.grad_y = x, y, grad_x, grad_y
        self.partials: list[Tensor] = []
        self.accumulate = False

    def loss(self) -> Tensor:
        return torch.cat(self.partials).sum().to(self.x.dtype)

    def add(self, view: View, coefficient: float, feature: bool) -> None:
        if feature:
            self.add_feature(view, coefficient)
        else:
            self.add_gram(view, (coefficient, 0.0, 0.0, 0.0))

    def add_gram(self, view: View, coefficients: tuple[float, float, float, float], positions: int = 1) -> None:
        x, y = view(self.x), view(self.y)
        precision = _precision(x)
        pairs = [(self.grad_x, x, 4.0), (self.grad_y, y, -4.0)]
        wanted = [(view(grad), rows, scale) for grad, rows, scale in pairs if grad is not None]
        if not wanted:
            weights = {"weights": coefficients, "positions": positions}
            self.partials.append(_product(x, x.mT, y, y.mT, **weights, symmetric=True, precision=precision))
            return
        batch, rows, _ = x.shape
        height = min(_strip_rows(batch, rows), rows)
        memory = x.new_empty(batch, height, rows)
        for first in range(0, rows, height):
            mine = slice(first, first + height)
            strip = memory[:, : rows - first]
            partials = _product(
                x[:, mine],
                x.mT,
                y[:, mine],
                y.mT,
                out=strip,
                weighted=True,
                weights=coefficients,
                positions=positions,
                first_row=first,
                precision=precision,
            )
            self.partials.append(partials)
            for grad, right, scale in wanted:
                out = grad[:, mine]
                _product(strip, right, out=out, scale=scale, accumulate=self.accumulate, precision=precision)
        self.accumulate = True

    def add_feature(self, view: View, coefficient: float, diagonal: float = 0.0) -> None:
        x, y = view(self.x), view(self.y)
        of_x, of_y = self.grad_x is not None, self.grad_y is not None
        p = self._norm(x.mT, x, coefficient, keep=of_x, symmetric=True)
        t = self._norm(y.mT, y, coefficient, keep=of_y, symmetric=True)
        q = self._norm(y.mT, x, -2 * coefficient, keep=of_x or of_y, symmetric=False)
        slopes = self._diagonal(diagonal) if diagonal else None
        options = {"scale": 4 * coefficient, "accumulate": self.accumulate, "precision": _precision(x, feature=True)}
        if of_x:
            _product(x, p, y, q, out=view(self.grad_x), slopes=slopes, **options)
        if of_y:
            slopes = None if slopes is None else -slopes
            _product(y, t, x, q.mT, out=view(self.grad_y), slopes=slopes, **options)
        self.accumulate = True

    def _norm(self, a: Tensor, b: Tensor, coefficient: float, *, keep: bool, symmetric: bool) -> Tensor | None:
        """Add ``coefficient · ‖A B‖²``, summed over the batch. Returns A B if it is to be kept."""
        product, partials = _deep_product(a, b, coefficient, keep=keep, symmetric=symmetric)
        self.partials.append(partials)
        return product

    def _diagonal(self, coefficient: float) -> Tensor:
        """Add ``coefficient · Σ D_rr²``. Returns its derivative with respect to half of ‖x_r‖², for each row r."""
        rows = self.x.shape[0]
        slopes = self.x.new_empty(rows)
        partials = self.x.new_empty(rows, dtype=torch.float64)
        columns = max(self.x.shape[1], self.y.shape[1])
        _diagonal_kernel[(rows,)](
            self.x,
            self.y,
            slopes,
            partials,
            *self.x.stride(),
            *self.y.stride(),
            self.x.shape[1],
            self.y.shape[1],
            coefficient,
            BLOCK=min(triton.next_power_of_2(columns), 1024),
        )
        self.partials.append(partials)
        return slopes


def _strip_rows(batch: int, rows: int) -> int:
    """Rows of each batch that are held at a time, against all its columns."""
    total = batch * rows
    least, most = STRIP_ELEMENTS
    return max(STRIP_ROWS, min(max(total**2 // 8, least), most) // total)


def _precision(x: Tensor, feature: bool = False) -> str:
    """Full float32 precision unless PyTorch allows less; and where large norms cancel, never plain tf32."""
    if x.dtype == torch.float64 or torch.version.hip or not allows_tf32():
        return "ieee"
    return "tf32x3" if feature else "tf32"


def _tile(dtype: torch.dtype, rows: int, columns: int, precision: str) -> tuple[int, int, int]:
    block_rows, block_columns, block_depth = TILES[dtype, precision]

    def fit(block: int, size: int) -> int:
        return max(16, min(block, triton.next_power_of_2(size)))

    return fit(block_rows, rows), fit(block_columns, columns), block_depth


def _deep_product(
    a: Tensor, b: Tensor, coefficient: float = 1.0, *, keep: bool = True, symmetric: bool = False
) -> tuple[Tensor | None, Tensor]:
    """A B of batches of matrices, None unless it is to be kept, and ``coefficient · ‖A B‖²`` in parts.

    The depth is cut into parts where there are few tiles. Of a product known to be symmetric half serves the norm.
    """
    precision = _precision(a, feature=True)
    batch, rows, depth = a.shape
    columns = b.shape[2]
    block_rows, block_columns, _ = _tile(a.dtype, rows, columns, precision)
    tiles = batch * triton.cdiv(rows, block_rows) * triton.cdiv(columns, block_columns)
    splits = max(1, min(triton.cdiv(depth, SPLIT_DEPTH), PROGRAMS // tiles))
    product = a.new_empty(batch, rows, columns) if keep else None
    if splits == 1:
        weights = (coefficient, 0.0, 0.0, 0.0)
        symmetric = symmetric and not keep
        return product, _product(a, b, out=product, weights=weights, symmetric=symmetric, precision=precision)
    parts = a.new_empty(batch * splits, rows, columns)
    _product(a, b, out=parts, splits=splits, precision=precision)
    blocks = triton.cdiv(rows * columns, FOLD_BLOCK)
    partials = a.new_empty(batch * blocks, dtype=torch.float64)
    _fold_kernel[(batch * blocks,)](
        parts,
        parts if product is None else product,
        partials,
        splits,
        rows * columns,
        coefficient,
        STORE=keep,
        BLOCK=FOLD_BLOCK,
    )
    return product, partials


def _product(
    a1: Tensor,
    b1: Tensor,
    a2: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    precision: str,
    out: Tensor | None = None,
    scale: float = 1.0,
    accumulate: bool = False,
    weights: tuple[float, float, float, float] | None = None,
    weighted: bool = False,
    positions: int = 1,
    first_row: int = 0,
    symmetric: bool = False,
    slopes: Tensor | None = None,
    splits: int = 1,
) -> Tensor | None:
    """C = A₁B₁ − A₂B₂ of batches of matrices, and what is done with it while it is in registers.

    Args:
        out: receives ``scale · C``, added to what it holds if ``accumulate``.
        weights: coefficients of ΣC² over all pairs, one image's, one position's and the diagonal: the result, in parts.
        weighted: each element of ``out`` is multiplied by its coefficient.
        positions, first_row: rows of C per image, and which row of the whole matrix the first one is.
        symmetric: C is known to be symmetric and only half of it is computed; not with ``out``.
        slopes: ``slopes[r] · A₁[r]`` is added to row r of ``out``.
        splits: cut the depth into so many parts, each a batch of its own in ``out``.
    """
    batch, rows, depth = a1.shape
    columns = b1.shape[2]
    block_rows, block_columns, block_depth = _tile(a1.dtype, rows, columns, precision)
    programs = batch * splits * triton.cdiv(rows, block_rows) * triton.cdiv(columns, block_columns)
    partials = None if weights is None else a1.new_empty(programs, dtype=torch.float64)
    full, intra, same, diagonal = weights or (1.0, 0.0, 0.0, 0.0)
    second = a2 is not None
    _product_kernel[(programs,)](
        a1,
        b1,
        a2 if second else a1,
        b2 if second else b1,
        a1 if out is None else out,
        a1 if partials is None else partials,
        a1 if slopes is None else slopes,
        *a1.stride(),
        *b1.stride(),
        *(a2.stride() if second else (0, 0, 0)),
        *(b2.stride() if second else (0, 0, 0)),
        *((0, 0, 0) if out is None else out.stride()),
        rows,
        columns,
        depth,
        a2.shape[2] if second else 0,
        triton.cdiv(triton.cdiv(depth, splits), block_depth) * block_depth,
        splits,
        first_row,
        positions,
        scale,
        full,
        intra,
        same,
        diagonal,
        SECOND=second,
        STORE=out is not None,
        ACCUMULATE=accumulate,
        REDUCE=weights is not None,
        WEIGHTED=weighted,
        RELATIONS=bool(intra or same or diagonal),
        SYMMETRIC=symmetric,
        SLOPES=slopes is not None,
        PRECISION=precision,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        BLOCK_DEPTH=block_depth,
        num_warps=max(1, min(block_rows * block_columns * a1.element_size() // 4096, 8)),
    )
    return partials


@triton.jit
def _multiply(
    acc,
    a_ptr,
    b_ptr,
    a_row_stride,
    a_stride,
    b_stride,
    b_column_stride,
    row,
    column,
    rows,
    columns,
    depth,
    PRECISION: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Add a tile of A B."""
    a_ptr += row.to(tl.int64)[:, None] * a_row_stride
    b_ptr += column.to(tl.int64)[None, :] * b_column_stride
    for start in range(0, depth, BLOCK_DEPTH):
        k = start + tl.arange(0, BLOCK_DEPTH)
        a = tl.load(
            a_ptr + k.to(tl.int64)[None, :] * a_stride, mask=(row < rows)[:, None] & (k < depth)[None, :], other=0
        )
        b = tl.load(
            b_ptr + k.to(tl.int64)[:, None] * b_stride, mask=(k < depth)[:, None] & (column < columns)[None, :], other=0
        )
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@triton.jit
def _product_kernel(
    a1_ptr,
    b1_ptr,
    a2_ptr,
    b2_ptr,
    out_ptr,
    partials_ptr,
    slopes_ptr,
    a1_batch_stride,
    a1_row_stride,
    a1_stride,
    b1_batch_stride,
    b1_stride,
    b1_column_stride,
    a2_batch_stride,
    a2_row_stride,
    a2_stride,
    b2_batch_stride,
    b2_stride,
    b2_column_stride,
    out_batch_stride,
    out_row_stride,
    out_stride,
    rows,
    columns,
    depth1,
    depth2,
    chunk,
    splits,
    first_row,
    positions,
    scale: tl.float64,
    full: tl.float64,
    intra: tl.float64,
    same: tl.float64,
    diagonal: tl.float64,
    SECOND: tl.constexpr,
    STORE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    REDUCE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    RELATIONS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SLOPES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    program = tl.program_id(0)
    tiles_across = tl.cdiv(columns, BLOCK_COLUMNS)
    tiles = tl.cdiv(rows, BLOCK_ROWS) * tiles_across
    tile = program % tiles
    part = (program // tiles).to(tl.int64)
    batch = part // splits
    split = part % splits
    row = tile // tiles_across * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tile % tiles_across * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    if SYMMETRIC:
        # Tiles below the diagonal have nothing to do: those above it count twice.
        above = tile // tiles_across * BLOCK_ROWS < (tile % tiles_across + 1) * BLOCK_COLUMNS
        depth1 = tl.where(above, depth1, 0)
        depth2 = tl.where(above, depth2, 0)

    dtype: tl.constexpr = a1_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype)
    if SECOND:
        a2_ptr += batch * a2_batch_stride
        b2_ptr += batch * b2_batch_stride
        acc = _multiply(
            acc, a2_ptr, b2_ptr, a2_row_stride, a2_stride, b2_stride, b2_column_stride,
            row, column, rows, columns, depth2, PRECISION, BLOCK_DEPTH,
        )  # fmt: skip
        acc = -acc
    a1_ptr += batch * a1_batch_stride
    b1_ptr += batch * b1_batch_stride
    start = split * chunk
    a_ptr = a1_ptr + start * a1_stride
    b_ptr = b1_ptr + start * b1_stride
    acc = _multiply(
        acc, a_ptr, b_ptr, a1_row_stride, a1_stride, b1_stride, b1_column_stride,
        row, column, rows, columns, tl.minimum(depth1 - start, chunk), PRECISION, BLOCK_DEPTH,
    )  # fmt: skip

    weight = tl.full((1, 1), full, tl.float64)
    if RELATIONS:
        r = (first_row + row)[:, None]
        s = column[None, :]
        weight += tl.where(r // positions == s // positions, tl.full((), intra, tl.float64), 0)
        weight += tl.where(r % positions == s % positions, tl.full((), same, tl.float64), 0)
        weight += tl.where(r == s, tl.full((), diagonal, tl.float64), 0)
    if REDUCE:
        wide = acc.to(tl.float64)
        squares = wide * wide * weight
        if SYMMETRIC:
            squares *= (row[:, None] < column[None, :]).to(tl.float64) + (row[:, None] <= column[None, :]).to(
                tl.float64
            )
        tl.store(partials_ptr + program, tl.sum(squares))
    if STORE:
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        result = acc * tl.full((), scale, dtype)
        if WEIGHTED:
            result *= weight.to(dtype)
        if SLOPES:
            slope = tl.load(slopes_ptr + row, mask=row < rows, other=0)[:, None]
            offsets = row.to(tl.int64)[:, None] * a1_row_stride + column.to(tl.int64)[None, :] * a1_stride
            result += slope * tl.load(a1_ptr + offsets, mask=inside, other=0)
        out_ptr += part * out_batch_stride
        out_ptrs = out_ptr + row.to(tl.int64)[:, None] * out_row_stride + column.to(tl.int64)[None, :] * out_stride
        if ACCUMULATE:
            result += tl.load(out_ptrs, mask=inside, other=0)
        tl.store(out_ptrs, result, mask=inside)


@triton.jit
def _fold_kernel(
    parts_ptr, out_ptr, partials_ptr, splits, size, coefficient: tl.float64, STORE: tl.constexpr, BLOCK: tl.constexpr
):
    """Add up the parts of a product that was split along its depth, and sum the squares."""
    program = tl.program_id(0)
    blocks = tl.cdiv(size, BLOCK)
    batch = (program // blocks).to(tl.int64)
    offsets = program % blocks * BLOCK + tl.arange(0, BLOCK)
    parts_ptr += batch * splits * size
    total = tl.zeros((BLOCK,), parts_ptr.dtype.element_ty)
    for split in range(splits):
        total += tl.load(parts_ptr + tl.cast(split, tl.int64) * size + offsets, mask=offsets < size, other=0)
    if STORE:
        tl.store(out_ptr + batch * size + offsets, total, mask=offsets < size)
    wide = total.to(tl.float64)
    tl.store(partials_ptr + program, tl.sum(wide * wide, 0) * tl.full((), coefficient, tl.float64))


@triton.jit
def _squared_norm(pointer, stride, length, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, length, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        value = tl.load(pointer + offsets.to(tl.int64) * stride, mask=offsets < length, other=0).to(tl.float64)
        total += value * value
    return tl.sum(total, 0)


@triton.jit
def _diagonal_kernel(
    x_ptr,
    y_ptr,
    slopes_ptr,
    partials_ptr,
    x_row_stride,
    x_stride,
    y_row_stride,
    y_stride,
    x_length,
    y_length,
    coefficient: tl.float64,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    difference = _squared_norm(x_ptr + row * x_row_stride, x_stride, x_length, BLOCK)
    difference -= _squared_norm(y_ptr + row * y_row_stride, y_stride, y_length, BLOCK)
    coefficient = tl.full((), coefficient, tl.float64)
    tl.store(partials_ptr + row, coefficient * difference * difference)
    tl.store(slopes_ptr + row, (4 * coefficient * difference).to(slopes_ptr.dtype.element_ty))
