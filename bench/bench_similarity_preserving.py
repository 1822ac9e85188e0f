"""SP's loss against eager and compiled PyTorch: ``pytest bench/bench_similarity_preserving.py``.

Measured as in bench_congruence.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from measure import compare, compiled, peaks
from torch import Tensor

import kdkernels

CASES = ((64, 64, 8), (256, 64, 8), (4096, 128, 1))


def fused(student: Tensor, teacher: Tensor) -> Tensor:
    return kdkernels.similarity_preserving_loss(student, teacher)


def textbook(student: Tensor, teacher: Tensor) -> Tensor:
    x, y = student.flatten(1), teacher.flatten(1)
    return (F.normalize(x @ x.T) - F.normalize(y @ y.T)).square().sum() / len(x) ** 2


def inputs(batch: int, channels: int, side: int) -> tuple[Tensor, Tensor]:
    shape = batch, channels, side, side
    return torch.randn(shape, requires_grad=True), torch.randn(shape)


VARIANTS = {"fused": fused, "textbook": textbook}
COMPILED = compiled({"textbook": textbook})


@pytest.mark.parametrize("case", CASES, ids="{0[0]} x {0[1]}x{0[2]}x{0[2]}".format)
def test_similarity_preserving(benchmark, case):
    compare(benchmark, VARIANTS | COMPILED, inputs(*case), peaks=peaks(VARIANTS, inputs, *case))
