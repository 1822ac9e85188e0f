"""ICCT's loss: ``pytest bench/bench_icc.py``.

The limit is this machine's rate of exponentials. The loss needs 2·b·K², one per entry of P, per sample and per network.
"""

from __future__ import annotations

import pytest
import torch
from measure import Case, Work
from torch import Tensor

import kdkernels


def inputs(batch: int, classes: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, classes, requires_grad=True), torch.randn(batch, classes)


def fused(student: Tensor, teacher: Tensor) -> Tensor:
    return kdkernels.inter_class_correlation_loss(student, teacher)


def fused_per_sample(student: Tensor, teacher: Tensor) -> Tensor:
    return kdkernels.inter_class_correlation_loss(student, teacher, per_sample=True)


def correlations(logits: Tensor) -> Tensor:
    return torch.softmax(logits[:, :, None] * logits[:, None, :], dim=2)


def textbook(student: Tensor, teacher: Tensor) -> Tensor:
    m_s, m_t = correlations(student).mean(0), correlations(teacher).mean(0)
    return (m_t * (m_t.log() - m_s.log())).sum() / len(m_s)


def textbook_per_sample(student: Tensor, teacher: Tensor) -> Tensor:
    q, p = correlations(student), correlations(teacher)
    return (p * (p.log() - q.log())).sum() / (p.shape[0] * p.shape[1])


def work(student: Tensor, teacher: Tensor) -> Work:
    return Work(exponentials=2 * student.shape[0] * student.shape[1] ** 2)


def case(batch: int, classes: int, headline: bool = False) -> Case:
    baselines = {"textbook": textbook} if classes < 10000 else {}  # the textbook version would need more than 20 GiB
    return Case(f"ICCT K={classes}", batch, inputs, (batch, classes), fused, baselines, work, headline=headline)


def per_sample(batch: int, classes: int) -> Case:
    loss, baselines = f"ICCT per sample K={classes}", {"textbook": textbook_per_sample}
    return Case(loss, batch, inputs, (batch, classes), fused_per_sample, baselines, work)


CASES = (
    *(case(64, classes, headline=True) for classes in (100, 1000)),
    *(case(batch, classes) for classes in (1000, 100) for batch in (1, 16, 256)),
    *(case(batch, classes) for classes in (10, 2) for batch in (1, 16, 64, 256)),
    *(per_sample(64, classes) for classes in (100, 1000)),
    case(8, 10000),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_icc(compare, case):
    compare(case)
