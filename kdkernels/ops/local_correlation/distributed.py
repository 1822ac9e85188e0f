"""Local correlation consistency over the images of all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import distributed
from ...distributed import Ranks
from ...native import accumulation_dtype
from ..congruence.distributed import congruence
from . import Settings, Stage, patches_of


def local_correlation_loss(stages: Sequence[Stage], settings: Settings, backend: str, group: object) -> Tensor:
    """The loss of one process on the concatenated batch; ``backend`` cuts each rank's own patches."""
    ranks = meet(stages, settings, group)
    return torch.stack([_stage(ranks, stage, settings, backend) for stage in stages]).sum()


def meet(stages: Sequence[Stage], settings: Settings, group: object) -> Ranks:
    images = stages[0].student.shape[0]
    if any(stage.student.shape[0] != images for stage in stages):
        raise ValueError(f"student must have the same batch size {images} in every stage when group is given")
    student, teacher = ([stage.lengths[i] for stage in stages] for i in range(2))
    return distributed.meet(
        group,
        images,
        stages[0].student.device,
        k=[stage.k for stage in stages],
        **{"student's patch lengths": student, "teacher's patch lengths": teacher},
        weights=stages[0].weights,
        reduction=stages[0].reduction,
        form=settings.form,
        dtype=[_dtype(stage) for stage in stages],
    )


def _stage(ranks: Ranks, stage: Stage, settings: Settings, backend: str) -> Tensor:
    dtype = _dtype(stage)
    x, y = (patches_of(stage, features, settings, backend).to(dtype) for features in stage[:2])
    return congruence(ranks, x, y, stage.k**2, stage.coefficients_for(ranks.samples), settings.form, backend)


def _dtype(stage: Stage) -> torch.dtype:
    return accumulation_dtype(stage.student, stage.teacher)
