"""Correlation congruence over the samples of all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import backends, distributed
from ...distributed import Ranks
from ...native import accumulation_dtype
from ..congruence.distributed import congruence
from ..congruence.plan import Coefficients
from . import check
from .reference import Kernel, kernel_matrix, rows_of


def correlation_congruence(
    student: Tensor,
    teacher: Tensor,
    kernel: Kernel,
    normalize: bool,
    reduction: str,
    form: str,
    backend: str,
    group: object,
) -> Tensor:
    """The congruence of the concatenated batch; see ``kdkernels.correlation_congruence_loss``."""
    check(student, teacher, kernel, reduction, form)
    backends.choose(backend, student)
    dtype = accumulation_dtype(student, teacher)
    widths = {"student's width": student.shape[1], "teacher's width": teacher.shape[1]}
    settings = {"kernel": tuple(kernel), "normalize": normalize, "reduction": reduction, "form": form, "dtype": dtype}
    ranks = distributed.meet(group, student.shape[0], student.device, **widths, **settings)
    scale = 1.0 / ranks.samples**2 if reduction == "mean" else 1.0
    with torch.autocast(student.device.type, enabled=False):
        x, y = (rows_of(embeddings, dtype, normalize) for embeddings in (student, teacher))
        if kernel.name == "mmd":  # depends on nothing but the means
            x, y = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
        if kernel.name == "bilinear":
            return congruence(ranks, x, y, 1, Coefficients(scale, 0.0, 0.0, 0.0), form, backend)
        return _ring(ranks, x, y, kernel, scale)


def _ring(ranks: Ranks, x: Tensor, y: Tensor, kernel: Kernel, scale: float) -> Tensor:
    def term(own: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
        of_student, of_teacher = (kernel_matrix(*rows, kernel) for rows in zip(own, others, strict=True))
        return scale * (of_student - of_teacher).square().sum()

    def run(x: Tensor, y: Tensor, *, wanted: Sequence[bool]) -> distributed.LossAndGradients:
        return distributed.sum_over_pairs(ranks, term, (x, y), wanted)

    return distributed.loss(ranks, run, x, y)
