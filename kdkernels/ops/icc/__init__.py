"""Inter-class correlation: row softmax of z zᵀ averaged over samples, and the divergence of two such maps."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends, checks
from . import reference

REDUCTIONS = ("mean", "sum")


def icc_map(logits: Tensor, *, backend: str = "auto") -> Tensor:
    """The K x K map of b x K logits; see ``kdkernels.inter_class_correlation``."""
    checks.tensor("logits", logits, 2, "b x K")
    run = {"reference": _reference_map}[backends.choose("reference" if backend == "auto" else backend, logits)]
    return run(logits)


def icc_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, per_sample: bool, reduction: str, backend: str = "auto"
) -> Tensor:
    """KL between two networks' maps; see ``kdkernels.inter_class_correlation_loss``."""
    check(student_logits, teacher_logits, reduction)
    run = {"reference": _reference_loss}[backends.choose("reference" if backend == "auto" else backend, student_logits)]
    return run(
        student_logits, teacher_logits, bool(per_sample), 1.0 if reduction == "sum" else 1.0 / student_logits.shape[1]
    )


def check(student: object, teacher: object, reduction: str) -> None:
    checks.logits(student, teacher)
    checks.one_of("reduction", reduction, REDUCTIONS)


# Autocast would change the precision of the sums.
def _reference_map(logits: Tensor) -> Tensor:
    with torch.autocast(logits.device.type, enabled=False):
        return reference.icc_map(logits)


def _reference_loss(student: Tensor, teacher: Tensor, per_sample: bool, scale: float) -> Tensor:
    with torch.autocast(student.device.type, enabled=False):
        return reference.icc_loss(student, teacher, per_sample, scale)
