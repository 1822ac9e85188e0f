"""Relational knowledge distillation: distances and angles within a batch, without a b x b x d or b x b x b tensor."""

from __future__ import annotations

from torch import Tensor

from ... import checks
from ...types import Backend
from ..operator import Operator
from . import fake, reference

RKD = Operator(
    "rkd",
    kernels=(fake.rkd,),
    native=("cpu",),
    memory="about 14 b x b matrices and b (2·d_S + d_T) numbers in float64, and a gradient twice",
    over_ranks="the embeddings of all ranks, B (d_S + d_T)",
)


def rkd(
    student: Tensor,
    teacher: Tensor,
    *,
    distance_weight: float,
    angle_weight: float,
    mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Weighted distance and angle terms; see ``kdkernels.relational_kd_loss``."""
    check(student, teacher, distance_weight, angle_weight, mask)
    settings = float(distance_weight), float(angle_weight)
    chosen = RKD.choose(backend, student)
    return RKD.loss(chosen, (student, teacher), settings, reference.rkd, mask)


def check(student: object, teacher: object, distance_weight: float, angle_weight: float, mask: object = None) -> None:
    student, _ = checks.embeddings(student, teacher)
    checks.sample_mask(mask, "student", student)
    check_settings(distance_weight, angle_weight)


def check_settings(distance_weight: float, angle_weight: float) -> None:
    checks.non_negative("distance_weight", distance_weight)
    checks.non_negative("angle_weight", angle_weight)
