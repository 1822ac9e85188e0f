"""kd's loss against eager and compiled PyTorch: ``pytest bench/bench_kd.py``. Measured as in bench_congruence.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from measure import compare, compiled
from torch import Tensor

import kdkernels

TEMPERATURE = 4.0


def textbook(student: Tensor, teacher: Tensor) -> Tensor:
    p = F.softmax(teacher / TEMPERATURE, dim=1)
    return F.kl_div(F.log_softmax(student / TEMPERATURE, dim=1), p, reduction="batchmean") * TEMPERATURE**2


def log_target(student: Tensor, teacher: Tensor) -> Tensor:
    log_p = F.log_softmax(teacher / TEMPERATURE, dim=1)
    log_q = F.log_softmax(student / TEMPERATURE, dim=1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * TEMPERATURE**2


def fused(student: Tensor, teacher: Tensor) -> Tensor:
    return kdkernels.kd_loss(student, teacher, temperature=TEMPERATURE)


BASELINES = {"textbook": textbook, "log target": log_target}
VARIANTS = {"fused": fused, **BASELINES, **compiled(BASELINES)}


@pytest.mark.parametrize("classes", [10, 100, 1000])
@pytest.mark.parametrize("batch", [1, 64, 256, 1024])
def test_kd(benchmark, batch, classes):
    compare(benchmark, VARIANTS, (torch.randn(batch, classes, requires_grad=True), torch.randn(batch, classes)))
