"""Relational knowledge distillation: distances and angles within a batch, without a b x b x d or b x b x b tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends, checks
from . import reference


def rkd(
    student: Tensor, teacher: Tensor, *, distance_weight: float, angle_weight: float, backend: str = "auto"
) -> Tensor:
    """Weighted distance and angle terms; see ``kdkernels.relational_kd_loss``."""
    check(student, teacher, distance_weight, angle_weight)
    run = {"reference": _reference}[backends.choose("reference" if backend == "auto" else backend, student)]
    return run(student, teacher, float(distance_weight), float(angle_weight))


def check(student: object, teacher: object, distance_weight: float, angle_weight: float) -> None:
    checks.embeddings(student, teacher)
    checks.non_negative("distance_weight", distance_weight)
    checks.non_negative("angle_weight", angle_weight)


def _reference(student: Tensor, teacher: Tensor, distance_weight: float, angle_weight: float) -> Tensor:
    with torch.autocast(student.device.type, enabled=False):
        return reference.rkd(student, teacher, distance_weight, angle_weight)
