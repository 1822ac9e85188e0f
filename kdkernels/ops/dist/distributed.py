"""DIST over the samples of all ranks."""

from __future__ import annotations

import functools

from torch import Tensor
from torch.distributed import ProcessGroup

from ... import checks, distributed
from ...types import Backend
from ..shapes import accumulation_dtype
from . import DIST, check_settings
from . import dist as dist_of_one


def dist(
    student_logits: Tensor,
    teacher_logits: Tensor,
    beta: float,
    gamma: float,
    temperature: float,
    mask: Tensor | None,
    backend: Backend,
    group: ProcessGroup,
) -> Tensor:
    """Return the loss of the concatenated batch; see ``kdkernels.dist_loss``."""
    student, teacher, rows = checks.rows_of_logits(student_logits, teacher_logits, mask)
    check_settings(beta, gamma, temperature)
    beta, gamma, temperature = float(beta), float(gamma), float(temperature)
    settings = {"beta": beta, "gamma": gamma, "temperature": temperature}
    student, teacher = (x.to(accumulation_dtype(x)) for x in (student, teacher))
    terms = {"number of classes": student.shape[1], "dtype": (student.dtype, teacher.dtype), "masked": mask is not None}
    ranks = distributed.agree(group, len(student), student.device, **settings, **terms)
    DIST.choose(backend, student)
    whole = functools.partial(
        dist_of_one, beta=beta, gamma=gamma, temperature=temperature, mask=None, backend=backend
    )
    return distributed.loss_of_all_rows(ranks, whole, student, teacher, mask=rows)
