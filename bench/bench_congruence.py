"""LKD's loss against what one would write oneself, eager and compiled: ``pytest bench/bench_congruence.py``.

pytest-benchmark times the fused loss; before each of its rounds every other variant takes one step, so that all are
measured side by side. The limit is this machine's matrix-product rate on the multiply-adds of the chosen form.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from measure import compare, compiled, gemm_rate
from textbook import full_gram, textbook
from torch import Tensor

import kdkernels


class Case(NamedTuple):
    """Features of ``stages`` (channels, side) for both networks, n images, k x k patches."""

    n: int
    k: int
    stages: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        return f"n={self.n} {' '.join(f'{c}x{h}x{h}' for c, h in self.stages)} k={self.k}"

    def inputs(self) -> tuple[list[Tensor], list[Tensor], int]:
        shapes = [(self.n, c, h, h) for c, h in self.stages]
        return [torch.randn(s, requires_grad=True) for s in shapes], [torch.randn(s) for s in shapes], self.k


CIFAR = ((16, 32), (32, 16), (64, 8))
PAPER = (Case(64, 4, CIFAR), Case(256, 4, ((64, 8),)), Case(512, 4, ((64, 8),)))
NAMED = (*PAPER, Case(64, 3, ((512, 7),)))
GRID = tuple(
    Case(n, k, (stage,))
    for stage in (CIFAR[0], CIFAR[2], (256, 8), (512, 7))
    for k in (1, 2, 4)
    for n in (1, 8, 64, 256, 512)
)


def fused(student: list[Tensor], teacher: list[Tensor], k: int) -> Tensor:
    return kdkernels.local_correlation_loss(student, teacher, k, partition="resize")


BASELINES = {"textbook": textbook, "full Gram": full_gram}
VARIANTS = {"fused": fused, **BASELINES}
COMPILED = compiled(BASELINES)


@pytest.mark.parametrize("case", [*NAMED, *GRID], ids=str)
def test_local_correlation(benchmark, case):
    inputs = case.inputs()
    compare(benchmark, VARIANTS | COMPILED, inputs, limit=multiply_adds(*inputs) / gemm_rate())


def multiply_adds(student: list[Tensor], teacher: list[Tensor], k: int) -> int:
    """Those of loss and student's gradient in the form that is chosen, symmetric products counted by halves."""
    stages = kdkernels.explain("local_correlation_loss", student, teacher, k, partition="resize").stages
    return sum(part.count * part.costs[part.form] for sums in stages for part in sums)
