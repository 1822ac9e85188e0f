"""dist's loss: ``pytest bench/bench_dist.py``. The limit is the bytes that must move."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from measure import Case, Work
from torch import Tensor

import kdkernels


def inputs(batch: int, classes: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, classes, requires_grad=True), torch.randn(batch, classes)


def textbook(student: Tensor, teacher: Tensor) -> Tensor:
    q, p = student.softmax(1), teacher.softmax(1)
    return _difference(q, p, 1) + _difference(q, p, 0)


def _difference(q: Tensor, p: Tensor, dim: int) -> Tensor:
    q, p = (x - x.mean(dim, keepdim=True) for x in (q, p))
    norms = torch.linalg.vector_norm(q, dim=dim) * torch.linalg.vector_norm(p, dim=dim)
    return 1 - ((q * p).sum(dim) / (norms + 1e-8)).mean()


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    q, p = student.softmax(1), teacher.softmax(1)
    of_rows, of_columns = (
        F.cosine_similarity(q - q.mean(dim, keepdim=True), p - p.mean(dim, keepdim=True), dim, 1e-8).mean()
        for dim in (1, 0)
    )
    return 2 - of_rows - of_columns


def fused(student: Tensor, teacher: Tensor) -> Tensor:
    return kdkernels.dist_loss(student, teacher)


def work(student: Tensor, teacher: Tensor) -> Work:
    return Work(bytes=2 * student.nbytes + teacher.nbytes)


def case(batch: int, classes: int, headline: bool = False) -> Case:
    baselines = {"textbook": textbook, "cosine": cosine}
    return Case(f"DIST K={classes}", batch, inputs, (batch, classes), fused, baselines, work, headline=headline)


CASES = tuple(
    case(batch, classes, headline=(batch, classes) == (256, 1000)) for classes in (1000, 100) for batch in (64, 256)
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dist(compare, case):
    compare(case)
