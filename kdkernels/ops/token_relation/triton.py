"""Triton kernels of ``token_relation``: a program owns a strip of rows, and passes over tiles of their relations.

``_log_sums_kernel`` finds the log-sum-exp of each row for "kl" and "cross_entropy". ``_compare_kernel`` computes the
tiles again, adds up the loss, and multiplies the slopes of the loss with the other rows. A program writes only to its
own rows, so results repeat bit by bit. ``congruence`` computes the feature form.

The kernels read rows in their own dtype. They multiply entries by a power of two, which is exact, and products by the
rest of the inverse norms. So tf32 loses nothing of rows in half precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...types import COMPARISONS
from ..congruence.plan import FEATURE
from ..congruence.triton import _precision, _Sums
from ..operator import in_triton
from ..shapes import accumulation_dtype, new_samples
from ..tuning import TOKEN_RELATION_TILES, TOKEN_RELATION_TILES_AMD
from . import fake
from .reference import EPS, as_tokens, pairs_of, weights_of

MSE, HINGE, KL, CROSS_ENTROPY = range(len(COMPARISONS))
LOWEST = tl.constexpr(-1e30)  # the logit of a column that does not count


@in_triton(fake.token_relation)
def _launch(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    comparison: int,
    clip: int,
    heads: int,
    batch: bool,
    channels: bool,
    normalize: bool,
    mean: bool,
    form: int,
    student_temperature: float,
    teacher_temperature: float,
    margin: float,
    grad_student: bool,
    grad_teacher: bool,
) -> tuple[Tensor, ...]:
    layout = heads, batch, channels
    dtype = accumulation_dtype(student, teacher)
    wanted = grad_student, grad_teacher
    with torch.cuda.device_of(student):
        if form == FEATURE.code:
            return _feature_form(student, teacher, mask, layout, normalize, mean, wanted)
        x, y = (
            _Input(f, mask, layout, normalize, dtype, want) for f, want in zip((student, teacher), wanted, strict=True)
        )
        counts = x.counts(mask)
        problem = _Problem(comparison, clip, (student_temperature, teacher_temperature), margin, normalize)
        factor = _factor(counts, counts, comparison, mean, dtype)
        both = problem.sums(x, x, y, y, None if mask is None else counts)
        total = problem.compare(
            x, x, y, y, counts, counts, (factor, factor), (both, both), symmetric=True, masked=mask is not None
        )
        return total.to(dtype), x.finished(), y.finished()


@in_triton(fake.token_relation_pairs)
def _launch_pairs(
    student: Tensor,
    student_keys: Tensor,
    teacher: Tensor,
    teacher_keys: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    comparison: int,
    clip: int,
    heads: int,
    batch: bool,
    channels: bool,
    normalize: bool,
    mean: bool,
    student_temperature: float,
    teacher_temperature: float,
    margin: float,
    grad_student: bool,
    grad_student_keys: bool,
    grad_teacher: bool,
    grad_teacher_keys: bool,
) -> tuple[Tensor, ...]:
    layout = heads, batch, channels
    dtype = accumulation_dtype(student, student_keys, teacher, teacher_keys)
    with torch.cuda.device_of(student):
        x, y = (
            _Input(f, mask, layout, normalize, dtype, want)
            for f, want in ((student, grad_student), (teacher, grad_teacher))
        )
        x_keys, y_keys = (
            _Input(f, key_mask, layout, normalize, dtype, want)
            for f, want in ((student_keys, grad_student_keys), (teacher_keys, grad_teacher_keys))
        )
        rows, columns = x.counts(mask), x_keys.counts(key_mask)
        masked = mask is not None or key_mask is not None
        both = comparison > CROSS_ENTROPY
        comparison -= 2 * both
        problem = _Problem(comparison, clip, (student_temperature, teacher_temperature), margin, normalize)
        factors = [
            _factor(*counts, comparison, mean, dtype) / (1 + both) for counts in ((rows, columns), (columns, rows))
        ]
        # A row without columns has no softmax, and a column without rows has none.
        rows, columns = rows & columns.any(1, keepdim=True), columns & rows.any(1, keepdim=True)
        queries, keys = (x, x_keys, y, y_keys, rows, columns), (x_keys, x, y_keys, y, columns, rows)
        sums = problem.sums(*queries[:4], columns if masked else None)
        of_keys = problem.sums(*keys[:4], rows if masked else None) if both else None
        total = problem.compare(*queries, factors, (sums, of_keys), masked=masked)
        if both or grad_student_keys or grad_teacher_keys:
            of_columns = problem.compare(*keys, factors[::-1], (of_keys, sums), masked=masked)
            total = total + of_columns if both else total
        return total.to(dtype), x.finished(), x_keys.finished(), y.finished(), y_keys.finished()


class _Input:
    """One input of one network: its rows, read in place where strides allow it, and its gradient."""

    def __init__(
        self,
        features: Tensor,
        mask: Tensor | None,
        layout: tuple[int, bool, bool],
        normalize: bool,
        dtype: torch.dtype,
        wanted: bool,
    ) -> None:
        self._layout = layout
        counted = features if mask is None else _without_masked(features, mask)
        self.rows = _arranged(counted, *layout)  # images x heads x rows x depth
        self.factors = _factors_of(self.rows, normalize, dtype)  # images·heads x 2 x rows
        self.gradient = new_samples(features, dtype) if wanted else features.new_empty(0, dtype=dtype)
        self.out = _arranged(self.gradient, *layout) if wanted else None

    def counts(self, mask: Tensor | None) -> Tensor:
        """Return which rows count, groups x rows."""
        return weights_of(mask, self.rows.flatten(0, 1), *self._layout)

    def finished(self) -> Tensor:
        """Return the gradient. The tokens of all images of a map have no common stride, so they have a copy."""
        if self.out is not None and self.out.data_ptr() != self.gradient.data_ptr():
            tokens = (self.out.mT if self._layout[2] else self.out).transpose(1, 2).flatten(2)
            maps = self.gradient.flatten(2)
            maps.copy_(tokens.view(len(maps), -1, tokens.shape[2]).mT)
        return self.gradient


def _arranged(features: Tensor, heads: int, batch: bool, channels: bool) -> Tensor:
    """Return rows as images x heads x rows x depth. With ``batch``, there is one image."""
    tokens = as_tokens(features)
    if batch:
        tokens = tokens.flatten(0, 1)[None]
    rows: Tensor = tokens.unflatten(2, (heads, -1)).transpose(1, 2)
    return rows.mT if channels else rows


def _without_masked(features: Tensor, mask: Tensor) -> Tensor:
    gone = mask.eq(0)
    if features.dim() == 4:
        return features.masked_fill(gone.reshape(-1, 1, *features.shape[2:]), 0)
    return features.masked_fill(gone[..., None], 0)


def _factors_of(rows: Tensor, normalize: bool, dtype: torch.dtype) -> Tensor:
    """Return two factors per row, whose product is the inverse norm: a power of two, and a number from 1 to 2."""
    if not normalize:
        return rows.new_ones((rows.shape[0] * rows.shape[1], 2, rows.shape[2]), dtype=dtype)
    norms = torch.linalg.vector_norm(rows, dim=3, dtype=torch.float64).flatten(0, 1)
    mantissa, exponent = torch.frexp(norms)
    powers = torch.ldexp(torch.ones_like(norms), -exponent)
    factors = torch.stack([torch.where(norms < torch.inf, powers, torch.nan), 1 / mantissa], 1)
    return factors.masked_fill((norms <= EPS)[:, None], 0).to(dtype)


def _factor(rows: Tensor, columns: Tensor, comparison: int, mean: bool, dtype: torch.dtype) -> Tensor:
    """Return what the sum over pairs or rows is multiplied by."""
    if not mean:
        return rows.new_ones((), dtype=dtype)
    by_pairs = comparison in (MSE, HINGE)
    count = pairs_of(rows, columns) if by_pairs else (rows & columns.any(1, keepdim=True)).sum().clamp(min=1)
    return (1 / count.double()).to(dtype)


def _feature_form(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    layout: tuple[int, bool, bool],
    normalize: bool,
    mean: bool,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, ...]:
    """Compute "mse" by ``congruence``, on packed rows of every group."""
    dtype = accumulation_dtype(student, teacher)
    inputs = [
        _Input(f, mask, layout, normalize, dtype, want) for f, want in zip((student, teacher), wanted, strict=True)
    ]
    packed, gradients = [], []
    for one in inputs:
        powers, rest = one.factors[..., None].unbind(1)
        packed.append(one.rows.flatten(0, 1).to(dtype) * powers * rest)
        gradients.append(None if one.out is None else torch.empty_like(packed[-1]))
    sums = _Sums(*packed, *gradients)
    sums.add_feature(lambda rows: rows, 1.0)
    counts = inputs[0].counts(mask)
    factor = _factor(counts, counts, MSE, mean, torch.float64)
    for one, rows, gradient in zip(inputs, packed, gradients, strict=True):
        if one.out is None or gradient is None:
            continue
        if normalize:
            gradient = (gradient - rows * (rows * gradient).sum(2, keepdim=True)) * one.factors.prod(1)[..., None]
        one.out.copy_((gradient * factor.to(dtype)).view(one.out.shape))
    return (torch.cat(sums.partials).sum() * factor).to(dtype), *(one.finished() for one in inputs)


class _Problem:
    """The settings of a comparison, and the launches."""

    def __init__(
        self, comparison: int, clip: int, temperatures: tuple[float, float], margin: float, normalize: bool
    ) -> None:
        self.comparison, self.clip, self.temperatures = comparison, clip, temperatures
        self.margin, self.normalize = margin, normalize
        self.by_rows = comparison in (KL, CROSS_ENTROPY)

    def sums(self, x: _Input, x_other: _Input, y: _Input, y_other: _Input, counts: Tensor | None) -> Tensor | None:
        """Return three numbers per row, groups x 3 x rows: the log-sum-exp of both networks, and what the teacher's
        gradient subtracts. Without a softmax there are none.
        """
        if not self.by_rows:
            return None
        tile = _Tile(x, x_other, y)
        sums = x.factors.new_empty(tile.groups, 3, tile.rows)
        _log_sums_kernel[(tile.programs,)](
            *(_argument(one) for one in (x, x_other, y, y_other)),
            sums if counts is None else counts,
            sums,
            *tile.sizes(x, y),
            *(1 / temperature for temperature in self.temperatures),
            CLIP=self.clip,
            IS_KL=self.comparison == KL,
            MASKED=counts is not None,
            **tile.options(x, y),
        )
        return sums

    def compare(
        self,
        x: _Input,
        x_other: _Input,
        y: _Input,
        y_other: _Input,
        counts: Tensor,
        other_counts: Tensor,
        factors: Sequence[Tensor],
        sums: tuple[Tensor | None, Tensor | None],
        *,
        symmetric: bool = False,
        masked: bool,
    ) -> Tensor:
        """Write the gradients to the rows of ``x`` and ``y``. Return the loss in float64.

        Args:
            factors: what the terms of these rows are multiplied by, and the terms of the other rows.
            sums: of the softmaxes of these rows, and of the softmaxes of the other rows, in which these are columns.
            symmetric: a relation has two entries, one in each of its rows.
        """
        own, others = sums
        tile = _Tile(x, x_other, y)
        partials = x.rows.new_empty(tile.programs, dtype=torch.float64)
        derivative = 1.0 if self.by_rows else (2.0 if self.comparison == MSE else 1.0) * (2.0 if symmetric else 1.0)
        _compare_kernel[(tile.programs,)](
            *(_argument(one) for one in (x, x_other, y, y_other)),
            *(_gradient_argument(one) for one in (x, y)),
            counts,
            other_counts,
            partials if own is None else own,
            partials if others is None else others,
            *factors,
            partials,
            *tile.sizes(x, y),
            *(1 / temperature for temperature in self.temperatures),
            *(derivative / (temperature if self.by_rows else 1) for temperature in self.temperatures),
            self.margin,
            COMPARISON=self.comparison,
            CLIP=self.clip,
            MASKED=masked,
            OWN=own is not None,
            OTHERS=others is not None,
            NORMALIZE=self.normalize,
            GRAD_X=x.out is not None,
            GRAD_Y=y.out is not None,
            GRAD_PRECISION_X=_precisions(x)[1],
            GRAD_PRECISION_Y=_precisions(y)[1],
            **tile.options(x, y),
        )
        return partials.sum() * factors[0].double()


class _Tile:
    """The programs of a launch: one per strip of rows of each group."""

    def __init__(self, x: _Input, other: _Input, y: _Input) -> None:
        images, self.heads, self.rows, _ = x.rows.shape
        self.columns = other.rows.shape[2]
        self.groups = images * self.heads
        half = _in_half_precision(x) and _in_half_precision(y)
        tiles = TOKEN_RELATION_TILES_AMD if torch.version.hip else TOKEN_RELATION_TILES
        block_rows, block_columns, self.block_depth, self.warps = tiles[torch.bfloat16 if half else x.factors.dtype]
        self.block_rows, self.block_columns = (
            max(16, min(block, int(triton.next_power_of_2(size))))
            for block, size in ((block_rows, self.rows), (block_columns, self.columns))
        )
        self.programs = self.groups * triton.cdiv(self.rows, self.block_rows)

    def sizes(self, x: _Input, y: _Input) -> tuple[int, ...]:
        return self.rows, self.columns, x.rows.shape[3], y.rows.shape[3], self.heads

    def options(self, x: _Input, y: _Input) -> dict[str, Any]:
        return {
            "PRECISION_X": _precisions(x)[0],
            "PRECISION_Y": _precisions(y)[0],
            "ROWS": self.block_rows,
            "COLUMNS": self.block_columns,
            "DEPTH": self.block_depth,
            "num_warps": self.warps,
        }


def _precisions(one: _Input) -> tuple[str, str]:
    """Return the precision of relations and of gradients. tf32 holds rows in half precision exactly, but no slopes."""
    if _in_half_precision(one) and not torch.version.hip:
        return "tf32", "tf32x3"
    precision = _precision(one.factors)
    return precision, precision


def _in_half_precision(one: _Input) -> bool:
    return one.rows.dtype.itemsize == 2 and one.factors.dtype == torch.float32


def _argument(one: _Input) -> tuple[Any, ...]:
    return one.rows, one.factors, *one.rows.stride()


def _gradient_argument(one: _Input) -> tuple[Any, ...]:
    out = one.factors if one.out is None else one.out
    return (out, *((0, 0, 0, 0) if one.out is None else out.stride()))


@triton.jit
def _entries(pointer, row, row_stride, rows, k, stride, depth, powers):
    """Return a tile of rows, multiplied by a power of two per row."""
    inside = (row < rows)[:, None] & (k < depth)[None, :]
    offsets = row.to(tl.int64)[:, None] * row_stride + k.to(tl.int64)[None, :] * stride
    return tl.load(pointer + offsets, mask=inside, other=0).to(powers.dtype) * powers[:, None]


@triton.jit
def _group_of(one, group, heads):
    """Return the pointers to the rows and to the factors of a group, and the strides of its rows."""
    pointer, factors, image_stride, head_stride, row_stride, stride = one
    return pointer + group // heads * image_stride + group % heads * head_stride, factors, row_stride, stride


@triton.jit
def _factors_of_rows(factors, group, row, rows):
    factors += group * 2 * rows
    powers = tl.load(factors + row, mask=row < rows, other=0)
    return powers, tl.load(factors + rows + row, mask=row < rows, other=0)


@triton.jit
def _relations(
    own, other, group, heads, row, column, rows, columns, depth, PRECISION: tl.constexpr, DEPTH: tl.constexpr
):
    """Return a tile of the relations of one network."""
    a_ptr, a_factors, a_row_stride, a_stride = _group_of(own, group, heads)
    b_ptr, b_factors, b_row_stride, b_stride = _group_of(other, group, heads)
    a_powers, a_rest = _factors_of_rows(a_factors, group, row, rows)
    b_powers, b_rest = _factors_of_rows(b_factors, group, column, columns)
    products = tl.zeros((row.shape[0], column.shape[0]), a_powers.dtype)
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        a = _entries(a_ptr, row, a_row_stride, rows, k, a_stride, depth, a_powers)
        b = _entries(b_ptr, column, b_row_stride, columns, k, b_stride, depth, b_powers)
        products = tl.dot(a, tl.trans(b), products, input_precision=PRECISION, out_dtype=products.dtype)
    return products * a_rest[:, None] * b_rest[None, :]


@triton.jit
def _kept(s, t, CLIP: tl.constexpr):
    """Return which relations ``clip`` leaves as they are, of the student and of the teacher. NaN stays."""
    keep_t = (t < 0) == 0
    if CLIP == 1:  # both
        return (s < 0) == 0, keep_t
    if CLIP == 2:  # teacher
        return ((s < 0) & (t < 0)) == 0, keep_t
    return s == s, keep_t


@triton.jit
def _clipped(s, t, CLIP: tl.constexpr):
    if CLIP != 0:
        keep_s, keep_t = _kept(s, t, CLIP)
        if CLIP != 3:
            s = tl.where(keep_s, s, 0)
        t = tl.where(keep_t, t, 0)
    return s, t


@triton.jit
def _payoff(s, t, IS_KL: tl.constexpr):
    """Return the terms whose mean under the teacher's softmax is the loss of a row, except for a constant."""
    return t - s if IS_KL else -s


@triton.jit
def _added(largest, total, logits):
    """Return the largest logits, the factors for sums relative to the old ones, and the new sums of exponentials."""
    now = tl.maximum(largest, tl.max(logits, 1))
    factor = tl.exp(largest - now)
    weights = tl.exp(logits - now[:, None])
    return now, factor, total * factor + tl.sum(weights, 1), weights


@triton.jit
def _log_sums_kernel(
    x,
    x_other,
    y,
    y_other,
    counts_ptr,
    sums_ptr,
    rows,
    columns,
    depth_x,
    depth_y,
    heads,
    inverse_temperature_s: tl.float64,
    inverse_temperature_t: tl.float64,
    CLIP: tl.constexpr,
    IS_KL: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION_X: tl.constexpr,
    PRECISION_Y: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    dtype: tl.constexpr = sums_ptr.dtype.element_ty
    strips = tl.cdiv(rows, ROWS)
    group = (tl.program_id(0) // strips).to(tl.int64)
    row = tl.program_id(0) % strips * ROWS + tl.arange(0, ROWS)
    inverse_s = tl.full((), inverse_temperature_s, dtype)
    inverse_t = tl.full((), inverse_temperature_t, dtype)
    largest_s = tl.full((ROWS,), LOWEST, dtype)
    largest_t = tl.full((ROWS,), LOWEST, dtype)
    total_s = tl.zeros((ROWS,), dtype)
    total_t = tl.zeros((ROWS,), dtype)
    weighted = tl.zeros((ROWS,), dtype)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        s = _relations(x, x_other, group, heads, row, column, rows, columns, depth_x, PRECISION_X, DEPTH)
        t = _relations(y, y_other, group, heads, row, column, rows, columns, depth_y, PRECISION_Y, DEPTH)
        s, t = _clipped(s, t, CLIP)
        s *= inverse_s
        t *= inverse_t
        counted = column < columns
        if MASKED:
            counted &= tl.load(counts_ptr + group * columns + column, mask=counted, other=0) != 0
        payoff = tl.where(counted[None, :], _payoff(s, t, IS_KL), 0)
        largest_s, factor, total_s, _ = _added(largest_s, total_s, tl.where(counted[None, :], s, LOWEST))
        largest_t, factor, total_t, weights = _added(largest_t, total_t, tl.where(counted[None, :], t, LOWEST))
        weighted = weighted * factor + tl.sum(weights * payoff, 1)
    sums_ptr += group * 3 * rows
    tl.store(sums_ptr + row, largest_s + tl.log(total_s), mask=row < rows)
    tl.store(sums_ptr + rows + row, largest_t + tl.log(total_t), mask=row < rows)
    tl.store(sums_ptr + 2 * rows + row, weighted / total_t, mask=row < rows)


@triton.jit
def _sums_of_rows(sums_ptr, group, row, rows):
    sums_ptr += group * 3 * rows
    of_student = tl.load(sums_ptr + row, mask=row < rows, other=0)
    of_teacher = tl.load(sums_ptr + rows + row, mask=row < rows, other=0)
    return of_student, of_teacher, tl.load(sums_ptr + 2 * rows + row, mask=row < rows, other=0)


@triton.jit
def _remainder(r):
    """Return exp(-r) - 1 + r for |r| <= 0.5."""
    series = tl.full((), 1, r.dtype)
    for i in tl.static_range(13):
        series = 1 - r * series * (1 / (15 - i))
    return 0.5 * r * r * series


@triton.jit
def _row_terms(s, t, of_student, of_teacher, expected, IS_KL: tl.constexpr):
    """Return loss and slopes of the terms of a softmax. A term of "kl" is q log(q/p) + p - q, which is not negative."""
    log_p = s - of_student
    log_q = t - of_teacher
    p = tl.exp(log_p)
    q = tl.exp(log_q)
    slope_t = q * (_payoff(s, t, IS_KL) - expected)
    if IS_KL:
        ratio = log_q - log_p
        near = (ratio <= 0.5) & (ratio >= -0.5)
        remainder = _remainder(tl.where(near, ratio, 0))
        loss = tl.where(near, q * remainder, q * ratio + (p - q))
        return loss, tl.where(near, q * (remainder - ratio), p - q), slope_t
    return -q * log_p, p - q, slope_t


@triton.jit
def _add_products(
    gradient,
    other,
    slopes,
    group,
    heads,
    row,
    column,
    rows,
    columns,
    depth,
    start,
    PRECISION: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Add slopes times the other rows to the gradient. The first tile of columns overwrites what was there."""
    out_ptr, out_image_stride, out_head_stride, out_row_stride, out_stride = gradient
    out_ptr += group // heads * out_image_stride + group % heads * out_head_stride
    pointer, factors, row_stride, stride = _group_of(other, group, heads)
    powers, rest = _factors_of_rows(factors, group, column, columns)
    slopes *= rest[None, :]
    for first in range(0, depth, DEPTH):
        k = first + tl.arange(0, DEPTH)
        inside = (row < rows)[:, None] & (k < depth)[None, :]
        out_ptrs = out_ptr + row.to(tl.int64)[:, None] * out_row_stride + k.to(tl.int64)[None, :] * out_stride
        products = tl.load(out_ptrs, mask=inside & (start > 0), other=0)
        others = _entries(pointer, column, row_stride, columns, k, stride, depth, powers)
        products = tl.dot(slopes, others, products, input_precision=PRECISION, out_dtype=products.dtype)
        tl.store(out_ptrs, products, mask=inside)


@triton.jit
def _finish(gradient, own, radial, scale, group, heads, row, rows, depth, NORMALIZE: tl.constexpr, DEPTH: tl.constexpr):
    """Scale a gradient to unit rows, and take it back to the rows: (g - radial x) / norm with radial = x . g."""
    out_ptr, out_image_stride, out_head_stride, out_row_stride, out_stride = gradient
    out_ptr += group // heads * out_image_stride + group % heads * out_head_stride
    pointer, factors, row_stride, stride = _group_of(own, group, heads)
    powers, rest = _factors_of_rows(factors, group, row, rows)
    for first in range(0, depth, DEPTH):
        k = first + tl.arange(0, DEPTH)
        inside = (row < rows)[:, None] & (k < depth)[None, :]
        out_ptrs = out_ptr + row.to(tl.int64)[:, None] * out_row_stride + k.to(tl.int64)[None, :] * out_stride
        products = tl.load(out_ptrs, mask=inside, other=0)
        if NORMALIZE:
            unit = _entries(pointer, row, row_stride, rows, k, stride, depth, powers) * rest[:, None]
            products = (products - unit * radial[:, None]) * (powers * rest)[:, None]
        tl.store(out_ptrs, products * scale, mask=inside)


@triton.jit
def _compare_kernel(
    x,
    x_other,
    y,
    y_other,
    grad_x,
    grad_y,
    counts_ptr,
    other_counts_ptr,
    sums_ptr,
    other_sums_ptr,
    factor_ptr,
    other_factor_ptr,
    partials_ptr,
    rows,
    columns,
    depth_x,
    depth_y,
    heads,
    inverse_temperature_s: tl.float64,
    inverse_temperature_t: tl.float64,
    scale_s: tl.float64,
    scale_t: tl.float64,
    margin: tl.float64,
    COMPARISON: tl.constexpr,
    CLIP: tl.constexpr,
    MASKED: tl.constexpr,
    OWN: tl.constexpr,
    OTHERS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    GRAD_X: tl.constexpr,
    GRAD_Y: tl.constexpr,
    PRECISION_X: tl.constexpr,
    PRECISION_Y: tl.constexpr,
    GRAD_PRECISION_X: tl.constexpr,
    GRAD_PRECISION_Y: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The rows of a program in all tiles of their relations. OWN and OTHERS say whose softmaxes have terms: these rows'
    and the other rows'.
    """
    dtype: tl.constexpr = factor_ptr.dtype.element_ty
    IS_KL: tl.constexpr = COMPARISON == 2
    BY_ROWS: tl.constexpr = COMPARISON >= 2
    strips = tl.cdiv(rows, ROWS)
    group = (tl.program_id(0) // strips).to(tl.int64)
    row = tl.program_id(0) % strips * ROWS + tl.arange(0, ROWS)
    factor = tl.load(factor_ptr)
    other_factor = tl.load(other_factor_ptr)
    inverse_s = tl.full((), inverse_temperature_s, dtype)
    inverse_t = tl.full((), inverse_temperature_t, dtype)
    row_counts = row < rows
    if MASKED:
        row_counts &= tl.load(counts_ptr + group * rows + row, mask=row_counts, other=0) != 0
    if OWN:
        of_student, of_teacher, expected = _sums_of_rows(sums_ptr, group, row, rows)
    total = tl.zeros((ROWS,), tl.float64)
    radial_x = tl.zeros((ROWS,), dtype)
    radial_y = tl.zeros((ROWS,), dtype)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        of_x = _relations(x, x_other, group, heads, row, column, rows, columns, depth_x, PRECISION_X, DEPTH)
        of_y = _relations(y, y_other, group, heads, row, column, rows, columns, depth_y, PRECISION_Y, DEPTH)
        s, t = _clipped(of_x, of_y, CLIP)
        if BY_ROWS:
            s *= inverse_s
            t *= inverse_t
            column_counts = column < columns
            if MASKED:
                counts = tl.load(other_counts_ptr + group * columns + column, mask=column_counts, other=0)
                column_counts &= counts != 0
            counted = row_counts[:, None] & column_counts[None, :]
            slope_s = tl.zeros((ROWS, COLUMNS), dtype)
            slope_t = tl.zeros((ROWS, COLUMNS), dtype)
            if OWN:
                loss, slope_s, slope_t = _row_terms(
                    s, t, of_student[:, None], of_teacher[:, None], expected[:, None], IS_KL
                )
                total += tl.sum(tl.where(counted, loss, 0), 1).to(tl.float64)
                slope_s *= factor
                slope_t *= factor
            if OTHERS:
                sum_s, sum_t, mean = _sums_of_rows(other_sums_ptr, group, column, columns)
                _, more_s, more_t = _row_terms(s, t, sum_s[None, :], sum_t[None, :], mean[None, :], IS_KL)
                slope_s += other_factor * more_s
                slope_t += other_factor * more_t
            slope_s = tl.where(counted, slope_s, 0)
            slope_t = tl.where(counted, slope_t, 0)
        else:  # the relations of rows that do not count are 0 in both networks
            difference = s - t
            if COMPARISON == 0:
                loss = difference * difference
                slope_s = difference
            else:
                beyond = tl.abs(difference) - tl.full((), margin, dtype)
                loss = tl.where(beyond <= 0, 0, beyond)
                slope_s = tl.where(beyond <= 0, 0, tl.where(difference < 0, -1.0, 1.0).to(dtype))
            slope_s *= factor
            slope_t = -slope_s
            total += tl.sum(loss, 1).to(tl.float64)
        if CLIP != 0:
            keep_s, keep_t = _kept(of_x, of_y, CLIP)
            slope_s = tl.where(keep_s, slope_s, 0)
            slope_t = tl.where(keep_t, slope_t, 0)
        if GRAD_X:
            radial_x += tl.sum(slope_s * of_x, 1)
        if GRAD_Y:
            radial_y += tl.sum(slope_t * of_y, 1)
        if GRAD_X:
            _add_products(
                grad_x,
                x_other,
                slope_s,
                group,
                heads,
                row,
                column,
                rows,
                columns,
                depth_x,
                start,
                GRAD_PRECISION_X,
                DEPTH,
            )
        if GRAD_Y:
            _add_products(
                grad_y,
                y_other,
                slope_t,
                group,
                heads,
                row,
                column,
                rows,
                columns,
                depth_y,
                start,
                GRAD_PRECISION_Y,
                DEPTH,
            )
        # A thread may next load what another thread of the program has stored.
        tl.debug_barrier()
    tl.store(partials_ptr + tl.program_id(0), tl.sum(total, 0))
    if GRAD_X:
        scale = tl.full((), scale_s, dtype)
        _finish(grad_x, x, radial_x, scale, group, heads, row, rows, depth_x, NORMALIZE, DEPTH)
    if GRAD_Y:
        scale = tl.full((), scale_t, dtype)
        _finish(grad_y, y, radial_y, scale, group, heads, row, rows, depth_y, NORMALIZE, DEPTH)
