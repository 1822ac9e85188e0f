"""Similarity-preserving distillation over the samples of all ranks."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ... import distributed
from ...distributed import LossAndGradients, Ranks
from ...types import Backend, FormName, Reduction
from ..congruence.distributed import cheaper_form, explained
from ..congruence.plan import Sum
from ..row_masks import zeroed
from ..shapes import accumulation_dtype
from . import SIMILARITY_PRESERVING, check
from .reference import EPS


def similarity_preserving(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    reduction: Reduction,
    form: FormName,
    backend: Backend,
    group: ProcessGroup,
) -> Tensor:
    """Return the loss of the concatenated batch; see ``kdkernels.similarity_preserving_loss``.

    Rows of normalised Gram matrices differ by ``2 − 2·cosine``, which nearly cancels for a good student, so it is
    computed in float64.
    """
    check(student, teacher, reduction, form, mask)
    given = student, teacher
    x, y = (rows.flatten(1) for rows in (given if mask is None else zeroed(mask, given)))
    dtype = accumulation_dtype(x, y)
    wanted = [torch.is_grad_enabled() and rows.requires_grad for rows in (x, y)]
    widths = {"student's width": x.shape[1], "teacher's width": y.shape[1]}
    settings = {"reduction": reduction, "form": form, "dtype": dtype, "requires_grad": wanted}
    ranks = distributed.agree(group, x.shape[0], x.device, **widths, **settings, masked=mask is not None)

    def sums(_: str) -> list[list[Sum]]:
        return [[explained(ranks, 1, x.shape[1], y.shape[1], False, form)]]

    SIMILARITY_PRESERVING.choose(backend, student, sums=sums)
    scale = 1.0 / ranks.samples**2 if reduction == "mean" else 1.0
    if form == "auto":
        form = cheaper_form(ranks, 1, x.shape[1], y.shape[1], by_position=False)
    run = {"feature": _feature_form, "gram": _gram_form}[form]
    loss = distributed.loss(ranks, functools.partial(run, ranks=ranks, scale=scale), x, y).to(dtype)
    return distributed.to_mean(ranks, loss, mask if reduction == "mean" else None, power=2)


def _feature_form(x: Tensor, y: Tensor, *, ranks: Ranks, scale: float, wanted: Sequence[bool]) -> LossAndGradients:
    """Compute the loss from ``(X Xᵀ)_i · (Y Yᵀ)_i = x_iᵀ (XᵀY) y_i``. The three products of features are summed over
    the ranks.
    """
    with torch.set_grad_enabled(any(wanted)):
        x, y = (rows.double().requires_grad_(want) for rows, want in zip((x, y), wanted, strict=True))
        own = [x.T @ x, y.T @ y, x.T @ y]
        sums = [s.requires_grad_(any(wanted)) for s in distributed.add(ranks, *(product.detach() for product in own))]
        pairs = ((x, sums[0], x), (y, sums[1], y), (x, sums[2], y))
        loss = scale * _rows_loss(*(((a @ s) * b).sum(1) for a, s, b in pairs))
    gradients: list[Tensor | None] = [None, None]
    if any(wanted):
        leaves = [rows for rows in (x, y) if rows.requires_grad]
        found = torch.autograd.grad(loss, [*leaves, *sums], retain_graph=True)
        of_sums = distributed.add(ranks, *found[len(leaves) :])
        through = [(product, grad) for product, grad in zip(own, of_sums, strict=True) if product.requires_grad]
        more = torch.autograd.grad([p for p, _ in through], leaves, [g for _, g in through])
        both = iter(a + b for a, b in zip(found, more, strict=False))
        gradients = [next(both) if want else None for want in wanted]
    return distributed.add(ranks, loss.detach())[0], gradients


def _gram_form(x: Tensor, y: Tensor, *, ranks: Ranks, scale: float, wanted: Sequence[bool]) -> LossAndGradients:
    """Go around the ring once for the products of rows of Gram matrices, and once more for the terms that depend on
    them.
    """
    x, y = x.double(), y.double()
    products = torch.zeros(3, len(x), dtype=torch.float64, device=x.device)
    for _, block in distributed.ring(ranks, torch.cat([x, y], 1)):
        x_s, y_s = block.split([x.shape[1], y.shape[1]], 1)
        step = max(1, distributed.CHUNK // len(block))
        for begin in range(0, len(x), step):
            chunk = slice(begin, begin + step)
            g, h = x[chunk] @ x_s.T, y[chunk] @ y_s.T
            for product, values in zip(products, (g * g, h * h, g * h), strict=True):
                product[chunk] += values.sum(1)
    products.requires_grad_(any(wanted))
    with torch.set_grad_enabled(any(wanted)):
        loss = scale * _rows_loss(*products)
    total = distributed.add(ranks, loss.detach())[0]
    if not any(wanted):
        return total, [None, None]
    (weights,) = torch.autograd.grad(loss, products)

    def term(own: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
        """Return a term with the derivative of the loss: a weight for each of every row's three products."""
        (x_r, y_r, w_r), (x_s, y_s, w_s) = own, others
        g, h = x_r @ x_s.T, y_r @ y_s.T
        of_x, of_y, of_both = ((a[:, None] + b) / 2 for a, b in zip(w_r.T, w_s.T, strict=True))
        weighted: Tensor = of_x * g * g + of_y * h * h + of_both * g * h
        return weighted.sum()

    rows = (x, y, weights.T.contiguous())
    _, gradients = distributed.sum_over_pairs(ranks, term, rows, [*wanted, False])
    return total, gradients[:2]


def _rows_loss(norms_x: Tensor, norms_y: Tensor, products: Tensor) -> Tensor:
    """Return ``Σ ‖q_S − q_T‖²`` of rows divided by their norms. A row of norm <= EPS is zero."""
    dead_x, dead_y = (norms <= EPS**2 for norms in (norms_x, norms_y))
    either = dead_x | dead_y
    lengths = (norms_x.masked_fill(either, 1) * norms_y.masked_fill(either, 1)).sqrt()
    cosines = (products / lengths).masked_fill(either, 0)
    undefined = 0 * (norms_x + norms_y).detach()  # NaN stays NaN even if the other network's row is zero
    return ((~dead_x).double() + (~dead_y).double() - 2 * cosines + undefined).sum()
