"""Relational distillation over the samples of all ranks."""

from __future__ import annotations

import functools

from torch import Tensor
from torch.distributed import ProcessGroup

from ... import distributed
from ...types import Backend
from ..shapes import accumulation_dtype
from . import RKD, check
from . import rkd as rkd_of_one


def rkd(
    student: Tensor,
    teacher: Tensor,
    distance_weight: float,
    angle_weight: float,
    mask: Tensor | None,
    backend: Backend,
    group: ProcessGroup,
) -> Tensor:
    """Return the loss of the concatenated batch; see ``kdkernels.relational_kd_loss``."""
    check(student, teacher, distance_weight, angle_weight, mask)
    settings = {"distance_weight": float(distance_weight), "angle_weight": float(angle_weight)}
    whole = functools.partial(
        rkd_of_one, distance_weight=float(distance_weight), angle_weight=float(angle_weight), backend=backend
    )
    x, y = (rows.to(accumulation_dtype(rows)) for rows in (student, teacher))
    widths = {"student's width": x.shape[1], "teacher's width": y.shape[1]}
    terms = {"dtype": (x.dtype, y.dtype), "masked": mask is not None}
    ranks = distributed.agree(group, len(x), x.device, **widths, **settings, **terms)
    RKD.choose(backend, student)
    return distributed.loss_of_all_rows(ranks, whole, x, y, mask=mask)
