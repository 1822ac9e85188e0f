"""Decoupled knowledge distillation: the label against all other classes, and the other classes among themselves."""

from __future__ import annotations

from torch import Tensor

from ... import checks
from ...types import LABEL_REDUCTIONS, Backend, LabelReduction
from ..operator import Operator
from . import fake, reference

DKD = Operator("dkd", kernels=(fake.dkd,), memory="a gradient, N x K, twice")


def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float,
    beta: float,
    temperature: float,
    reduction: LabelReduction,
    mask: Tensor | None,
    ignore_index: int,
    backend: Backend = "auto",
) -> Tensor:
    """T² (alpha·TCKD + beta·NCKD) of the rows that count, or of each row; see ``kdkernels.dkd_loss``."""
    student, teacher, rows = checks.rows_of_logits(student_logits, teacher_logits, mask)
    check_settings(alpha, beta, temperature, reduction, ignore_index)
    labels = checks.class_indices(labels, student, student_logits.shape[:-1], ignore_index, rows)
    settings = float(alpha), float(beta), float(temperature), LABEL_REDUCTIONS.index(reduction), int(ignore_index)
    chosen = DKD.choose(backend, student)
    loss = DKD.loss(chosen, (student, teacher, labels), settings, reference.dkd)
    return loss.view(student_logits.shape[:-1]) if reduction == "none" else loss


def check_settings(alpha: float, beta: float, temperature: float, reduction: str, ignore_index: int) -> None:
    checks.finite("alpha", alpha)
    checks.finite("beta", beta)
    checks.positive("temperature", temperature)
    checks.one_of("reduction", reduction, LABEL_REDUCTIONS)
    checks.index("ignore_index", ignore_index)
