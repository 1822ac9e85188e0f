"""The difference of two correlation structures over the rows of all ranks."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import distributed
from ...distributed import LossAndGradients, Ranks
from ...types import Backend, FormName
from . import congruence as congruence_of_one
from .plan import FEATURE, GRAM, Coefficients, Sum

MOVED = 256  # multiply-adds in the time that one number needs between ranks


def congruence(
    ranks: Ranks, x: Tensor, y: Tensor, positions: int, coefficients: Coefficients, form: FormName, backend: Backend
) -> Tensor:
    """Return ``congruence`` of the concatenated rows of all ranks.

    All pairs of one image are on one rank. So each rank computes the sum over these pairs and over the diagonal, with
    ``backend``.
    """
    full, intra, same, diagonal = coefficients
    parts = []
    if full or same or not (intra or diagonal):
        if form == "auto":
            form = cheaper_form(ranks, positions, x.shape[1], y.shape[1], bool(same))
        run = {"feature": _feature_form, "gram": _gram_form}[form]
        run = functools.partial(run, ranks=ranks, positions=positions, full=full, same=same)
        parts.append(distributed.loss(ranks, run, x, y))
    if intra or diagonal:
        own = congruence_of_one(x, y, positions=positions, coefficients=(0.0, intra, 0.0, diagonal), backend=backend)
        parts.append(distributed.sum_over(ranks, own))
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def cheaper_form(ranks: Ranks, positions: int, d_student: int, d_teacher: int, by_position: bool) -> FormName:
    cost = costs(ranks, positions, d_student, d_teacher, by_position)
    return min(cost, key=cost.__getitem__)


def explained(ranks: Ranks, positions: int, d_student: int, d_teacher: int, by_position: bool, form: FormName) -> Sum:
    """The sum over the pairs of all ranks. A number moved to another rank counts as ``MOVED`` multiply-adds."""
    cost = costs(ranks, positions, d_student, d_teacher, by_position)
    modelled = {GRAM: round(cost["gram"]), FEATURE: round(cost["feature"])}
    chosen = min(modelled, key=modelled.__getitem__) if form == "auto" else {"gram": GRAM, "feature": FEATURE}[form]
    return Sum(f"all pairs over {ranks.world} ranks", ranks.samples * positions, 1, chosen, modelled)


def costs(ranks: Ranks, positions: int, d_student: int, d_teacher: int, by_position: bool) -> dict[FormName, float]:
    """Return the cost of a rank in each form, computation and communication, in multiply-adds."""
    rows, sums = ranks.samples * positions, _sums(d_student, d_teacher)
    products: dict[FormName, int] = {"feature": sums, "gram": rows * (d_student + d_teacher)}
    moved = numbers_moved(ranks, positions, d_student, d_teacher, by_position)
    return {form: 2 * rows / ranks.world * products[form] + MOVED * moved[form] for form in products}


def numbers_moved(
    ranks: Ranks, positions: int, d_student: int, d_teacher: int, by_position: bool
) -> dict[FormName, float]:
    """Return how many numbers a rank sends for one loss in each form. It receives as many.

    Feature form: an all-reduce of d_S² + d_T² + d_S·d_T sums, per position if positions are compared. Gram form: the
    rows of all other ranks.
    """
    others = (ranks.world - 1) / ranks.world
    return {
        "feature": 2 * others * _sums(d_student, d_teacher) * (positions if by_position else 1),
        "gram": others * ranks.samples * positions * (d_student + d_teacher),
    }


def _sums(d_student: int, d_teacher: int) -> int:
    return d_student**2 + d_teacher**2 + d_student * d_teacher


def _feature_form(
    x: Tensor, y: Tensor, *, ranks: Ranks, positions: int, full: float, same: float, wanted: Sequence[bool]
) -> LossAndGradients:
    """Return ``full · n(XᵀX, YᵀY, YᵀX)`` plus ``same`` times n of every position, where n is ‖P‖² + ‖T‖² − 2‖Q‖²."""
    sets = positions if same else 1
    x_sets, y_sets = (rows.view(-1, sets, rows.shape[1]).transpose(0, 1) for rows in (x, y))
    products = (a.transpose(1, 2) @ b for a, b in ((x_sets, x_sets), (y_sets, y_sets), (y_sets, x_sets)))
    p, t, q = distributed.add(ranks, *products)

    def squared_norm(sums: Tensor) -> Tensor:
        sums = sums.double()
        return full * sums.sum(0).square().sum() + same * sums.square().sum()

    def weighted(sums: Tensor) -> Tensor:
        return 4 * (full * sums.sum(0) + same * sums)

    # The three norms nearly cancel for a good student, so they are summed in float64.
    loss = squared_norm(p) + squared_norm(t) - 2 * squared_norm(q)
    grad_x = x_sets @ weighted(p) - y_sets @ weighted(q) if wanted[0] else None
    grad_y = y_sets @ weighted(t) - x_sets @ weighted(q).transpose(1, 2) if wanted[1] else None
    gradients = [None if grad is None else grad.transpose(0, 1).reshape(len(x), -1) for grad in (grad_x, grad_y)]
    return loss.to(x.dtype), gradients


def _gram_form(
    x: Tensor, y: Tensor, *, ranks: Ranks, positions: int, full: float, same: float, wanted: Sequence[bool]
) -> LossAndGradients:
    def term(own: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
        (x_r, y_r), (x_s, y_s) = own, others
        squares = (x_r @ x_s.T - y_r @ y_s.T).square()
        total = full * squares.sum()
        if same:
            pairs = squares.view(-1, positions, len(x_s) // positions, positions)
            total = total + same * torch.einsum("ipjp->", pairs)
        return total

    return distributed.sum_over_pairs(ranks, term, (x, y), wanted, positions)
