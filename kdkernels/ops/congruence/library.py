"""``congruence`` by PyTorch's matrix products.

Gram form: strips of D = X Xᵀ − Y Yᵀ from the diagonal on. A fused kernel sums W∘D² and replaces D by the slopes
S = 4·W∘D, whose gradients are S·X and −S·Y. Feature form: the norms of P = XᵀX, T = YᵀY and Q = YᵀX, with gradients
4·(X·P − Y·Q) and 4·(Y·T − X·Qᵀ).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..library import Rows, View, by_triton, new_slopes, store, strips, twice_beyond
from ..operator import by_library, full_precision
from . import fake
from .plan import FEATURE


@by_library(fake.congruence)
def launch(
    x: Tensor,
    y: Tensor,
    positions: int,
    coefficients: list[float],
    plan: list[int],
    grad_x: bool,
    grad_y: bool,
    tf32: bool = False,
) -> tuple[Tensor, ...]:
    gradients = [rows.new_zeros(rows.shape if wanted else (0,)) for rows, wanted in ((x, grad_x), (y, grad_y))]
    wanted = [grad if want else None for grad, want in zip(gradients, (grad_x, grad_y), strict=True)]
    with full_precision(x.device):
        sums = _Sums(x, y, wanted, tf32)
        full, intra, same, diagonal = coefficients
        if full and plan[0] != FEATURE.code:
            sums.add_gram(lambda rows: rows[None], coefficients, positions)
        else:
            if full:
                sums.add_feature(lambda rows: rows[None], full)
            if diagonal:
                sums.add_diagonal(diagonal)
            for coefficient, code, view in ((intra, plan[1], _by_image), (same, plan[2], _by_position)):
                if coefficient:
                    sums.add(view(positions), coefficient, code == FEATURE.code)
        return sums.loss(), *gradients


def _by_image(positions: int) -> View:
    return lambda rows: rows.unflatten(0, (-1, positions))


def _by_position(positions: int) -> View:
    return lambda rows: rows.unflatten(0, (-1, positions)).transpose(0, 1)


class _Sums:
    """The loss in float64, and the gradients. Terms are added one after the other."""

    def __init__(self, x: Tensor, y: Tensor, wanted: Sequence[Tensor | None], tf32: bool) -> None:
        # The feature form subtracts large sums, and never rounds to tf32.
        self.x, self.y, self.wanted = x, y, wanted
        self.rows_x, self.rows_y = Rows.of(x, tf32), Rows.of(y, tf32)
        self.exact = (self.rows_x, self.rows_y) if not tf32 else None
        self.parts: list[Tensor] = []

    def loss(self) -> Tensor:
        if not self.parts:
            return self.x.new_zeros(())
        return torch.cat([part.reshape(-1) for part in self.parts]).sum().to(self.x.dtype)

    def add(self, view: View, coefficient: float, feature: bool) -> None:
        if feature:
            self.add_feature(view, coefficient)
        else:
            self.add_gram(view, [coefficient, 0.0, 0.0, 0.0])

    def add_gram(self, view: View, coefficients: list[float], positions: int = 1) -> None:
        x, y = self.rows_x.sets(view), self.rows_y.sets(view)
        sets, rows, _ = x.x.shape
        for mine in strips(sets, rows):
            strip = x.products(mine, slice(mine.start, None))
            y.subtract_products(strip, mine, slice(mine.start, None))
            slopes = new_slopes(strip, x) if any(grad is not None for grad in self.wanted) else None
            self.parts.append(compare(strip, slopes, mine, coefficients, positions))
            for own, grad, sign in ((x, self.wanted[0], 1), (y, self.wanted[1], -1)):
                if grad is not None and slopes is not None:
                    own.add_gradient(view(grad), slopes, mine.start, sign)

    def add_feature(self, view: View, coefficient: float) -> None:
        x, y = (rows.sets(view) for rows in self._exact())
        p, t, q = x.inner(x), y.inner(y), y.inner(x)
        for norm, factor in ((p, 1), (t, 1), (q, -2)):
            self.parts.append(factor * coefficient * norm.square().sum(dtype=torch.float64))
        for grad, own, product, other, across in (
            (self.wanted[0], x, p, y, q),
            (self.wanted[1], y, t, x, q.mT),
        ):
            if grad is not None:
                view(grad).add_(own.times(product), alpha=4 * coefficient)
                view(grad).sub_(other.times(across), alpha=4 * coefficient)

    def _exact(self) -> tuple[Rows, Rows]:
        if self.exact is None:
            self.exact = Rows.of(self.x), Rows.of(self.y)
        return self.exact

    def add_diagonal(self, coefficient: float) -> None:
        squares = (rows.double().square().sum(1, keepdim=True) for rows in (self.x, self.y))
        difference = next(squares) - next(squares)
        self.parts.append(coefficient * difference.square().sum())
        slopes = (4 * coefficient * difference).to(self.x.dtype)
        for grad, rows, sign in ((self.wanted[0], self.x, 1), (self.wanted[1], self.y, -1)):
            if grad is not None:
                grad.addcmul_(slopes, rows, value=sign)


def compare(strip: Tensor, slopes: Tensor | None, mine: slice, coefficients: list[float], positions: int) -> Tensor:
    """Return parts of ΣW∘D² of a strip of D, sets x height x width. Write the slopes 4·W∘D."""
    if by_triton(strip):
        from .triton import compare_strip

        return compare_strip(strip, slopes, mine, coefficients, positions)
    weighted = _weights(strip, mine, coefficients, positions) * strip
    if slopes is not None:
        store(slopes, 4 * weighted)
    return twice_beyond(weighted.double() * strip, strip.shape[1])


def _weights(strip: Tensor, mine: slice, coefficients: list[float], positions: int) -> Tensor | float:
    full, *others = coefficients
    if not any(others):
        return full
    r = torch.arange(mine.start, mine.stop, device=strip.device)[:, None]
    s = torch.arange(mine.start, mine.start + strip.shape[2], device=strip.device)
    pairs = (r // positions == s // positions, r % positions == s % positions, r == s)
    weights = torch.full(strip.shape[1:], full, dtype=torch.float64, device=strip.device)
    for coefficient, equal in zip(others, pairs, strict=True):
        weights = weights + coefficient * equal.double()
    return weights.to(strip.dtype)
