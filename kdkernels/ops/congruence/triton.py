"""Triton kernels of ``congruence``: a product of tiles, C = A₁B₁ − A₂B₂, serves every step of both forms.

Gram form, for strips I of rows: S = W∘(X_I Xᵀ − Y_I Yᵀ), whose gradients are 4·S·X and −4·S·Y. Feature form: the norms
of P = XᵀX, T = YᵀY and Q = YᵀX, with gradients 4·(X·P − Y·Q) and 4·(Y·T − X·Qᵀ).

W has the coefficient of each pair of rows. Programs store sums of squares in float64, and these are added in a fixed
order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...native import allows_tf32
from ..operator import in_triton
from ..planes import store_planes
from ..tuning import CONGRUENCE_FOLD_BLOCK as FOLD_BLOCK
from ..tuning import CONGRUENCE_PROGRAMS as PROGRAMS
from ..tuning import CONGRUENCE_SPLIT_DEPTH as SPLIT_DEPTH
from ..tuning import CONGRUENCE_TILES as TILES
from ..tuning import LIBRARY_TILE
from . import fake
from .plan import FEATURE

# A strip has at most an eighth of the N x N matrix. It has at least the first and at most the second number of
# elements.
STRIP_ELEMENTS = 2**20, 2**24
STRIP_ROWS = 128

View = Callable[[Tensor], Tensor]


@in_triton(fake.congruence)
def _launch(
    x: Tensor,
    y: Tensor,
    positions: int,
    coefficients: list[float],
    plan: list[int],
    grad_x: bool,
    grad_y: bool,
    tf32: bool = False,
) -> tuple[Tensor, ...]:
    gradients = [rows.new_empty(rows.shape if wanted else (0,)) for rows, wanted in ((x, grad_x), (y, grad_y))]
    sums = _Sums(x, y, *(g if wanted else None for g, wanted in zip(gradients, (grad_x, grad_y), strict=True)))
    full, intra, same, diagonal = coefficients
    over_all, over_image, over_position = (code == FEATURE.code for code in plan)
    whole = bool(full or diagonal) or not any(coefficients)
    with torch.cuda.device_of(x):
        if whole and not over_all:
            sums.add_gram(lambda rows: rows[None], (full, intra, same, diagonal), positions)
            return sums.loss(), *gradients
        if whole:
            sums.add_feature(lambda rows: rows[None], full, diagonal)
        if intra:
            sums.add(lambda rows: rows.unflatten(0, (-1, positions)), intra, over_image)
        if same:
            sums.add(lambda rows: rows.unflatten(0, (-1, positions)).transpose(0, 1), same, over_position)
        return sums.loss(), *gradients


class _Sums:
    """The parts of the loss, and the gradients. Terms are added one after the other.

    A term is a sum over batches of pairs of rows. Its view of the rows has shape batch x rows x d.
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
            partials = _product(
                x, x.mT, y, y.mT, weights=coefficients, positions=positions, symmetric=True, precision=precision
            )
            self.partials.append(partials)
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
        grad_x, grad_y = self.grad_x, self.grad_y
        p = self._norm(x.mT, x, coefficient, keep=grad_x is not None, symmetric=True)
        t = self._norm(y.mT, y, coefficient, keep=grad_y is not None, symmetric=True)
        learns = grad_x is not None or grad_y is not None
        q = self._norm(y.mT, x, -2 * coefficient, keep=learns, symmetric=False)
        slopes = self._diagonal(diagonal) if diagonal else None
        precision = _precision(x, feature=True)
        options: dict[str, Any] = {"scale": 4 * coefficient, "accumulate": self.accumulate, "precision": precision}
        if grad_x is not None:
            _product(x, p, y, q, out=view(grad_x), slopes=slopes, **options)
        if grad_y is not None:
            slopes = None if slopes is None else -slopes
            _product(y, t, x, q.mT, out=view(grad_y), slopes=slopes, **options)
        self.accumulate = True

    def _norm(self, a: Tensor, b: Tensor, coefficient: float, *, keep: bool, symmetric: bool) -> Tensor:
        """Add ``coefficient · ‖A B‖²``, summed over the batch. Return A B, which is empty unless it is kept."""
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
    """Return the number of rows of a strip per batch. A strip has all columns."""
    total = batch * rows
    least, most = STRIP_ELEMENTS
    return max(STRIP_ROWS, min(max(total**2 // 8, least), most) // total)


def _precision(x: Tensor, feature: bool = False) -> str:
    """Return full float32 precision unless PyTorch allows less. Where large norms cancel, never return plain tf32."""
    if x.dtype == torch.float64 or torch.version.hip or not allows_tf32():
        return "ieee"
    return "tf32x3" if feature else "tf32"


def _tile(dtype: torch.dtype, rows: int, columns: int, precision: str) -> tuple[int, int, int]:
    block_rows, block_columns, block_depth = TILES[dtype, precision]

    def fit(block: int, size: int) -> int:
        return max(16, min(block, int(triton.next_power_of_2(size))))

    return fit(block_rows, rows), fit(block_columns, columns), block_depth


def _deep_product(
    a: Tensor, b: Tensor, coefficient: float = 1.0, *, keep: bool = True, symmetric: bool = False
) -> tuple[Tensor, Tensor]:
    """Return A B of batches of matrices, empty unless it is kept, and the parts of ``coefficient · ‖A B‖²``.

    The depth is cut into parts if there are few tiles. For a symmetric product, half of it gives the norm.
    """
    precision = _precision(a, feature=True)
    batch, rows, depth = a.shape
    columns = b.shape[2]
    block_rows, block_columns, _ = _tile(a.dtype, rows, columns, precision)
    tiles = batch * triton.cdiv(rows, block_rows) * triton.cdiv(columns, block_columns)
    splits = max(1, min(triton.cdiv(depth, SPLIT_DEPTH), PROGRAMS // tiles))
    product = a.new_empty((batch, rows, columns) if keep else 0)
    if splits == 1:
        weights = (coefficient, 0.0, 0.0, 0.0)
        out, symmetric = (product, False) if keep else (None, symmetric)
        return product, _product(a, b, out=out, weights=weights, symmetric=symmetric, precision=precision)
    parts = a.new_empty(batch * splits, rows, columns)
    _product(a, b, out=parts, splits=splits, precision=precision)
    blocks = triton.cdiv(rows * columns, FOLD_BLOCK)
    partials = a.new_empty(batch * blocks, dtype=torch.float64)
    _fold_kernel[(batch * blocks,)](
        parts,
        product,
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
) -> Tensor:
    """Compute C = A₁B₁ − A₂B₂ of batches of matrices, and process it while it is in registers.

    Args:
        out: receives ``scale · C``. ``accumulate`` adds it to the content.
        weights: coefficients of ΣC² over all pairs, pairs of one image, pairs of one position, and the diagonal. The
            result has the parts of this sum, and is empty without weights.
        weighted: each element of ``out`` is multiplied by its coefficient.
        positions, first_row: rows of C per image, and the index of the first row in the whole matrix.
        symmetric: C is symmetric, and only half of it is computed. Not with ``out``.
        slopes: ``slopes[r] · A₁[r]`` is added to row r of ``out``.
        splits: cut the depth into this number of parts. Each part is a separate batch in ``out``.
    """
    batch, rows, depth = a1.shape
    columns = b1.shape[2]
    block_rows, block_columns, block_depth = _tile(a1.dtype, rows, columns, precision)
    programs = batch * splits * triton.cdiv(rows, block_rows) * triton.cdiv(columns, block_columns)
    partials = a1.new_empty(0 if weights is None else programs, dtype=torch.float64)
    full, intra, same, diagonal = weights or (1.0, 0.0, 0.0, 0.0)
    _product_kernel[(programs,)](
        a1,
        b1,
        a1 if a2 is None else a2,
        b1 if b2 is None else b2,
        a1 if out is None else out,
        partials,
        a1 if slopes is None else slopes,
        *a1.stride(),
        *b1.stride(),
        *((0, 0, 0) if a2 is None else a2.stride()),
        *((0, 0, 0) if b2 is None else b2.stride()),
        *((0, 0, 0) if out is None else out.stride()),
        rows,
        columns,
        depth,
        0 if a2 is None else a2.shape[2],
        triton.cdiv(triton.cdiv(depth, splits), block_depth) * block_depth,
        splits,
        first_row,
        positions,
        scale,
        full,
        intra,
        same,
        diagonal,
        SECOND=a2 is not None,
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
        # Tiles below the diagonal do nothing, because tiles above it count twice.
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
    """Add the parts of a product that was split along its depth, and sum the squares."""
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


def compare_strip(
    strip: Tensor, slopes: Tensor | None, mine: slice, coefficients: list[float], positions: int
) -> Tensor:
    """Process a strip of D, which a matrix product has computed: sets x height x width.

    Returns the parts of ΣW∘D², and writes the slopes 4·W∘D.
    """
    sets, height, width = strip.shape
    rows, columns = LIBRARY_TILE
    programs = sets * triton.cdiv(height, rows) * triton.cdiv(width, columns)
    partials = strip.new_empty(programs, dtype=torch.float64)
    full, intra, same, diagonal = coefficients
    with torch.cuda.device_of(strip):
        _strip_kernel[(programs,)](
            strip,
            strip if slopes is None else slopes,
            partials,
            height,
            width,
            mine.start,
            positions,
            full,
            intra,
            same,
            diagonal,
            RELATIONS=bool(intra or same or diagonal),
            STORE=slopes is not None,
            PLANES=slopes.shape[1] if slopes is not None and slopes.dtype == torch.bfloat16 else 0,
            BLOCK_ROWS=rows,
            BLOCK_COLUMNS=columns,
        )
    return partials


@triton.jit
def _strip_kernel(
    strip_ptr,
    slopes_ptr,
    partials_ptr,
    height,
    width,
    first,
    positions,
    full: tl.float64,
    intra: tl.float64,
    same: tl.float64,
    diagonal: tl.float64,
    RELATIONS: tl.constexpr,
    STORE: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    across = tl.cdiv(width, BLOCK_COLUMNS)
    per_set = tl.cdiv(height, BLOCK_ROWS) * across
    one = (program // per_set).to(tl.int64)
    tile = program % per_set
    row = tile // across * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = tile % across * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    inside = (row < height) & (column < width)
    offsets = row.to(tl.int64) * width + column
    size = tl.cast(height, tl.int64) * width
    entry = tl.load(strip_ptr + one * size + offsets, mask=inside, other=0)
    weight = tl.full((1, 1), full, tl.float64)
    if RELATIONS:
        r = first + row
        s = first + column
        weight += tl.where(r // positions == s // positions, tl.full((), intra, tl.float64), 0)
        weight += tl.where(r % positions == s % positions, tl.full((), same, tl.float64), 0)
        weight += tl.where(r == s, tl.full((), diagonal, tl.float64), 0)
    weighted = entry * weight.to(entry.dtype)
    # The columns beyond the strip's own rows also stand for the entries on the other side of the diagonal.
    counted = (weighted * entry).to(tl.float64) * tl.where(column < height, 1.0, 2.0).to(tl.float64)
    tl.store(partials_ptr + program, tl.sum(counted))
    if STORE:
        planes: tl.constexpr = 1 if PLANES == 0 else PLANES
        store_planes(slopes_ptr + one * planes * size, offsets, size, 4 * weighted, inside, PLANES)
