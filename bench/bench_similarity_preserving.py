"""SP's loss: ``pytest bench/bench_similarity_preserving.py``. The limit is the matrix products of the chosen form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from measure import Case, Work
from torch import Tensor

import kdkernels


def inputs(batch: int, channels: int, side: int) -> tuple[Tensor, Tensor]:
    shape = batch, channels, side, side
    return torch.randn(shape, requires_grad=True), torch.randn(shape)


def fused(student: Tensor, teacher: Tensor) -> Tensor:
    return kdkernels.similarity_preserving_loss(student, teacher)


def textbook(student: Tensor, teacher: Tensor) -> Tensor:
    x, y = student.flatten(1), teacher.flatten(1)
    return (F.normalize(x @ x.T) - F.normalize(y @ y.T)).square().sum() / len(x) ** 2


def work(student: Tensor, teacher: Tensor) -> Work:
    ((part,),) = kdkernels.explain("similarity_preserving_loss", student, teacher).stages
    return Work(multiply_adds=part.costs[part.form])


def case(batch: int, channels: int, side: int, headline: bool = False) -> Case:
    loss = f"SP {channels}x{side}x{side}"
    return Case(loss, batch, inputs, (batch, channels, side), fused, {"textbook": textbook}, work, headline=headline)


CASES = (
    case(64, 64, 8, headline=True),
    *(case(batch, 64, 8) for batch in (16, 256)),
    *(case(batch, 128, 1) for batch in (64, 1024)),
    case(4096, 128, 1, headline=True),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_similarity_preserving(compare, case):
    compare(case)
