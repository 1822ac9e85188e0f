"""kd's loss: ``pytest bench/bench_kd.py``. The limit is the bytes that must move."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from measure import AGREEMENT, Case, Work
from torch import Tensor

import kdkernels

TEMPERATURE = 4.0


def inputs(batch: int, classes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    student, teacher = (torch.randn(batch, classes).to(dtype) for _ in range(2))
    return student.requires_grad_(), teacher


def textbook(student: Tensor, teacher: Tensor) -> Tensor:
    p = F.softmax(teacher / TEMPERATURE, dim=1)
    return F.kl_div(F.log_softmax(student / TEMPERATURE, dim=1), p, reduction="batchmean") * TEMPERATURE**2


def log_target(student: Tensor, teacher: Tensor) -> Tensor:
    log_p = F.log_softmax(teacher / TEMPERATURE, dim=1)
    log_q = F.log_softmax(student / TEMPERATURE, dim=1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * TEMPERATURE**2


def upcast(student: Tensor, teacher: Tensor) -> Tensor:
    return log_target(student.float(), teacher.float())


def fused(student: Tensor, teacher: Tensor) -> Tensor:
    return kdkernels.kd_loss(student, teacher, temperature=TEMPERATURE)


def work(student: Tensor, teacher: Tensor) -> Work:
    return Work(bytes=2 * student.nbytes + teacher.nbytes)


def case(batch: int, classes: int, headline: bool = False) -> Case:
    baselines = {"textbook": textbook, "log target": log_target}
    return Case(f"KD K={classes}", batch, inputs, (batch, classes), fused, baselines, work, headline=headline)


def vocabulary(dtype: torch.dtype) -> Case:
    """Return the logits of 1,024 tokens. In bfloat16, the textbook rounds probabilities to eight bits."""
    baselines = {"textbook": textbook, "log target": log_target}
    agreement = AGREEMENT
    if dtype == torch.bfloat16:
        baselines["log target in float32"] = upcast
        agreement = 0.1
    name = f"KD K=32000, {str(dtype).removeprefix('torch.')}"
    return Case(name, 1024, inputs, (1024, 32000, dtype), fused, baselines, work, agreement=agreement)


CASES = (
    *(
        case(batch, classes, headline=(batch, classes) == (64, 1000))
        for classes in (1000, 100, 10)
        for batch in (1, 64, 256, 1024)
    ),
    *map(vocabulary, (torch.float32, torch.bfloat16)),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kd(compare, case):
    compare(case)
