"""Relational distillation over the samples of all ranks."""

from __future__ import annotations

import functools

from torch import Tensor

from ... import distributed
from ...native import accumulation_dtype
from . import check, choose_backend
from . import rkd as rkd_of_one


def rkd(
    student: Tensor, teacher: Tensor, distance_weight: float, angle_weight: float, backend: str, group: object
) -> Tensor:
    """The loss of the concatenated batch; see ``kdkernels.relational_kd_loss``."""
    check(student, teacher, distance_weight, angle_weight)
    choose_backend(backend, student)
    settings = {"distance_weight": float(distance_weight), "angle_weight": float(angle_weight)}
    whole = functools.partial(rkd_of_one, **settings, backend=backend)
    x, y = (rows.to(accumulation_dtype(rows)) for rows in (student, teacher))
    widths = {"student's width": x.shape[1], "teacher's width": y.shape[1]}
    ranks = distributed.meet(group, len(x), x.device, **widths, **settings, dtype=(x.dtype, y.dtype))
    return distributed.loss_of_all_rows(ranks, whole, x, y)
