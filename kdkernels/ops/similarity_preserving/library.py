"""``similarity_preserving`` by PyTorch's matrix products.

Gram form: strips of G = X Xᵀ and H = Y Yᵀ. A first pass over the strips gives the inverse norms r and s of the rows,
and 1 − cos of the rows of both. A second pass, from the diagonal on, gives the loss and its slopes S, and S·X and S·Y
are the gradients. If all rows fit in one strip, both passes read the same products. Feature form: the products XᵀX, YᵀY
and XᵀY give each row's contribution and gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..library import Rows, by_triton, new_slopes, store, strips
from ..operator import by_library, full_precision
from ..shapes import accumulation_dtype
from . import fake
from .reference import EPS

Gradients = Sequence[Tensor | None]


class Norms(NamedTuple):
    """Numbers per row: the inverse norms of the rows of G and of H, 1 − cos, and the contribution to the loss."""

    inverse_x: Tensor
    inverse_y: Tensor
    defects: Tensor
    terms: Tensor


@by_library(fake.similarity_preserving)
def _launch(
    student: Tensor, teacher: Tensor, scale: float, feature: bool, grad_student: bool, grad_teacher: bool
) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(student, teacher)
    gradients = [
        x.new_zeros(x.shape if wanted else (0,), dtype=dtype)
        for x, wanted in ((student, grad_student), (teacher, grad_teacher))
    ]
    wanted = [
        gradient.view(len(gradient), -1) if want else None
        for gradient, want in zip(gradients, (grad_student, grad_teacher), strict=True)
    ]
    with full_precision(student.device):
        x, y = student.flatten(1), teacher.flatten(1)
        if feature:
            total = _feature_form(x.to(dtype), y.to(dtype), scale, wanted)
        else:
            double = dtype == torch.float64
            total = _gram_form(x.to(dtype) if double else x, y.to(dtype) if double else y, scale, wanted)
    return total.to(dtype), *gradients


def _gram_form(x: Tensor, y: Tensor, scale: float, gradients: Gradients) -> Tensor:
    networks = [Rows.of(rows.contiguous()).sets(lambda values: values[None]) for rows in (x, y)]
    of_strips = list(strips(1, len(x)))
    everything = slice(None)

    def products(mine: slice, others: slice) -> tuple[Tensor, Tensor]:
        return networks[0].products(mine, others)[0], networks[1].products(mine, others)[0]

    kept = products(everything, everything) if len(of_strips) == 1 else None
    norms = [_reduce(g, g, h, h, g) for g, h in (kept or products(mine, everything) for mine in of_strips)]
    of_rows = Norms(*(torch.cat(part) for part in zip(*norms, strict=True)))
    parts = []
    for mine in of_strips:
        g, h = kept or products(mine, slice(mine.start, None))
        slopes = [
            new_slopes(g[None], rows) if grad is not None else None
            for rows, grad in zip(networks, gradients, strict=True)
        ]
        parts.append(_compare(g, h, of_rows, slopes, mine.start, 2 * scale).reshape(-1))
        for rows, grad, of_own in zip(networks, gradients, slopes, strict=True):
            if grad is not None and of_own is not None:
                rows.add_gradient(grad[None], of_own, mine.start)
    return scale * torch.cat(parts).sum()


def _reduce(left_x: Tensor, right_x: Tensor, left_y: Tensor, right_y: Tensor, left_across: Tensor) -> Norms:
    """Return the numbers of each row. The squared norms of a row are the dot products of the first two arguments, and
    of the next two. The product with the other network's row is the last argument times ``right_y``.
    """
    if by_triton(left_x):
        from .triton import reduce_rows

        return Norms(*reduce_rows(left_x, right_x, left_y, right_y, left_across))

    def products(a: Tensor, b: Tensor) -> Tensor:
        return (a.double() * b).sum(1)

    r, s = _inverse_norm(products(left_x, right_x)), _inverse_norm(products(left_y, right_y))
    cosines = r * s * products(left_across, right_y)
    dtype = left_x.dtype
    return Norms(r.to(dtype), s.to(dtype), (1 - cosines).to(dtype), (r != 0).double() + (s != 0).double() - 2 * cosines)


def _inverse_norm(squares: Tensor) -> Tensor:
    """Return the inverse norm, 0 for a zero row, and NaN for a row that is not finite."""
    squares = torch.where(squares < torch.inf, squares, torch.nan)
    dead = squares <= EPS**2
    return torch.where(dead, 0, torch.where(dead, 1, squares).rsqrt())


def _compare(g: Tensor, h: Tensor, norms: Norms, slopes: list[Tensor | None], first: int, factor: float) -> Tensor:
    """Return parts of the loss of a strip without its factor, and write the slopes."""
    if by_triton(g):
        from .triton import compare_strips

        return compare_strips(g, h, norms.inverse_x, norms.inverse_y, norms.defects, slopes, first, factor)
    height = len(g)
    r, s, defects = (part[first : first + height, None] for part in norms[:3])
    r_too, s_too, defects_too = (part[first:] for part in norms[:3])
    difference, difference_too = r * g - s * h, r_too * g - s_too * h
    if slopes[0] is not None:
        slope = r * (difference - defects * r * g) + r_too * (difference_too - defects_too * r_too * g)
        store(slopes[0], factor * slope[None])
    if slopes[1] is not None:
        slope = s * (difference + defects * s * h) + s_too * (difference_too + defects_too * s_too * h)
        store(slopes[1], -factor * slope[None])
    # Entries beyond the strip's own rows also stand for the entries on the other side of the diagonal.
    return difference.double().square().sum() + difference_too[:, height:].double().square().sum()


def _feature_form(x: Tensor, y: Tensor, scale: float, gradients: Gradients) -> Tensor:
    """Compute the loss from ``(X Xᵀ)_i · (Y Yᵀ)_i = x_iᵀ (XᵀY) y_i``."""

    def prepared(rows: Tensor) -> Rows:
        return Rows.of(rows.contiguous()).sets(lambda values: values[None])

    rows_x, rows_y = prepared(x), prepared(y)
    across = rows_x.inner(rows_y)
    of_x, of_y = (rows.times(rows.inner(rows))[0].contiguous() for rows in (rows_x, rows_y))
    x, y = x.contiguous(), y.contiguous()
    norms = _reduce(of_x, x, of_y, y, rows_x.times(across)[0].contiguous())
    cosines, cross = (1 - norms.defects)[:, None], (norms.inverse_x * norms.inverse_y)[:, None]
    for gradient, own, other, of_own, to_own, inverse in (
        (gradients[0], rows_x, rows_y, of_x, across.mT, norms.inverse_x),
        (gradients[1], rows_y, rows_x, of_y, across, norms.inverse_y),
    ):
        if gradient is None:
            continue
        values = own.x[0]
        squares = cosines * (inverse * inverse)[:, None]
        gradient += own.times(own.inner(prepared(squares * values)))[0]
        gradient -= other.times(other.inner(prepared(cross * values)))[0]
        gradient += squares * of_own - cross * other.times(to_own)[0]
        gradient *= 2 * scale
    return scale * norms.terms.sum()
