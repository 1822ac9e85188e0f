"""Correlation congruence over the samples of all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ... import distributed
from ...distributed import Ranks
from ...types import Backend, FormName, Reduction
from ..congruence.distributed import congruence, explained
from ..congruence.plan import Coefficients, Sum
from ..row_masks import zeroed
from ..shapes import accumulation_dtype
from . import CORRELATION_CONGRUENCE, check
from .reference import Kernel, kernel_matrix, rows_of


def correlation_congruence(
    student: Tensor,
    teacher: Tensor,
    kernel: Kernel,
    normalize: bool,
    mask: Tensor | None,
    reduction: Reduction,
    form: FormName,
    backend: Backend,
    group: ProcessGroup,
) -> Tensor:
    """Return the congruence of the concatenated batch; see ``kdkernels.correlation_congruence_loss``."""
    check(student, teacher, kernel, reduction, form, mask)
    if mask is not None:
        student, teacher = zeroed(mask, (student, teacher))
    dtype = accumulation_dtype(student, teacher)
    widths = {"student's width": student.shape[1], "teacher's width": teacher.shape[1]}
    settings = {"kernel": tuple(kernel), "normalize": normalize, "reduction": reduction, "form": form, "dtype": dtype}
    ranks = distributed.agree(group, student.shape[0], student.device, **widths, **settings, masked=mask is not None)

    def sums(_: str) -> list[list[Sum]]:
        only = form if kernel.name == "bilinear" else "gram"
        return [[explained(ranks, 1, student.shape[1], teacher.shape[1], False, only)]]

    CORRELATION_CONGRUENCE.choose(backend, student, sums=sums)
    scale = 1.0 / ranks.samples**2 if reduction == "mean" else 1.0
    with torch.autocast(student.device.type, enabled=False):
        x, y = (rows_of(embeddings, dtype, normalize) for embeddings in (student, teacher))
        if kernel.name == "mmd":  # depends only on the means
            x, y = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
        if kernel.name == "bilinear":
            loss = congruence(ranks, x, y, 1, Coefficients(scale, 0.0, 0.0, 0.0), form, backend)
        else:
            loss = _ring(ranks, x, y, kernel, scale, mask)
    return distributed.to_mean(ranks, loss, mask if reduction == "mean" else None, power=2)


def _ring(ranks: Ranks, x: Tensor, y: Tensor, kernel: Kernel, scale: float, mask: Tensor | None) -> Tensor:
    counts = [] if mask is None else [mask[:, None].to(x.dtype)]

    def term(own: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
        of_student, of_teacher = (kernel_matrix(*rows, kernel) for rows in zip(own[:2], others[:2], strict=True))
        squares = (of_student - of_teacher).square()
        for own_counts, other_counts in zip(own[2:], others[2:], strict=True):
            squares = squares * (own_counts * other_counts.T)
        return scale * squares.sum()

    def run(x: Tensor, y: Tensor, *, wanted: Sequence[bool]) -> distributed.LossAndGradients:
        total, gradients = distributed.sum_over_pairs(ranks, term, (x, y, *counts), [*wanted, *[False] * len(counts)])
        return total, gradients[:2]

    return distributed.loss(ranks, run, x, y)
