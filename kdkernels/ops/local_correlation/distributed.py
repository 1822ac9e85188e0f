"""Local correlation consistency over the images of all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ... import distributed
from ...distributed import Ranks
from ...types import Backend, FormName
from ..congruence.distributed import congruence, explained
from ..congruence.plan import Sum
from ..shapes import accumulation_dtype
from . import LOCAL_CORRELATION, Settings, Stage, patches_of, per_pair


def local_correlation_loss(
    stages: Sequence[Stage], settings: Settings, backend: Backend, group: ProcessGroup
) -> Tensor:
    """Return the loss of one process on the concatenated batch. ``backend`` cuts each rank's own patches."""
    ranks = agree(stages, settings, group)

    def sums(_: str) -> list[list[Sum]]:
        return [[_explained(ranks, stage, settings.form)] for stage in stages]

    LOCAL_CORRELATION.choose(backend, stages[0].student, sums=sums)
    return torch.stack([_stage(ranks, stage, settings, backend) for stage in stages]).sum()


def agree(stages: Sequence[Stage], settings: Settings, group: ProcessGroup) -> Ranks:
    images = stages[0].student.shape[0]
    if any(stage.student.shape[0] != images for stage in stages):
        raise ValueError(f"student must have the same batch size {images} in every stage when group is given")
    student, teacher = ([stage.lengths[i] for stage in stages] for i in range(2))
    return distributed.agree(
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


def _stage(ranks: Ranks, stage: Stage, settings: Settings, backend: Backend) -> Tensor:
    if stage.reduction == "batchmean":
        stage = stage.weighted(per_pair(ranks.samples))
    dtype = _dtype(stage)
    x, y = (patches_of(stage, features, settings, backend).to(dtype) for features in stage[:2])
    return congruence(ranks, x, y, stage.k**2, stage.coefficients_for(ranks.samples), settings.form, backend)


def _explained(ranks: Ranks, stage: Stage, form: FormName) -> Sum:
    by_position = stage.coefficients_for(ranks.samples).inter_same != 0
    return explained(ranks, stage.k**2, *stage.lengths, by_position, form)


def _dtype(stage: Stage) -> torch.dtype:
    return accumulation_dtype(stage.student, stage.teacher)
