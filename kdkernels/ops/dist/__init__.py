"""DIST: correlations of two networks' probabilities, in each row and in each column of a batch."""

from __future__ import annotations

from torch import Tensor

from ... import checks
from ...types import Backend
from ..operator import Operator
from . import fake, reference

DIST = Operator(
    "dist",
    kernels=(fake.dist,),
    memory="both networks' probabilities, 2·N·K",
    over_ranks="the logits of all ranks, 2·N·K",
)


def dist(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float,
    gamma: float,
    temperature: float,
    mask: Tensor | None,
    backend: Backend = "auto",
) -> Tensor:
    """Correlations of rows and of columns; see ``kdkernels.dist_loss``."""
    student, teacher, rows = checks.rows_of_logits(student_logits, teacher_logits, mask)
    check_settings(beta, gamma, temperature)
    settings = float(beta), float(gamma), float(temperature)
    chosen = DIST.choose(backend, student)
    return DIST.loss(chosen, (student, teacher, rows), settings, reference.dist)


def check_settings(beta: float, gamma: float, temperature: float = 1.0) -> None:
    checks.finite("beta", beta)
    checks.finite("gamma", gamma)
    checks.positive("temperature", temperature)
