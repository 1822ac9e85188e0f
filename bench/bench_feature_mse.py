"""SemCKD's loss of all layer pairs: ``pytest bench/bench_feature_mse.py``.

The student's projections have its own map size, or the smaller of both sizes if it pools before it projects. The limit
is the bytes that must move. Every map is read twice, because the backward pass writes the gradients.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from measure import Case, Work
from semckd import FORMATS, STUDENT, TEACHER, maps
from torch import Tensor

import kdkernels

Maps = list[list[Tensor]]


def inputs(batch: int, memory_format: str, pooled_before: bool) -> tuple[Maps, Maps, Tensor]:
    teacher = [maps(batch, *layer, memory_format) for layer in TEACHER]
    projected = [
        [
            maps(batch, c, min(side, height) if pooled_before else side, memory_format, learns=True)
            for c, height in TEACHER
        ]
        for _, side in STUDENT
    ]
    weights = torch.softmax(torch.randn(batch, len(STUDENT), len(TEACHER)), dim=2)
    return projected, [teacher] * len(STUDENT), weights.requires_grad_()


def fused(projected: Maps, targets: Maps, weights: Tensor) -> Tensor:
    return kdkernels.cross_layer_mse(projected, targets, weights)


def textbook(projected: Maps, targets: Maps, weights: Tensor) -> Tensor:
    errors = [
        [sample_errors(own, target) for own, target in zip(*layers, strict=True)]
        for layers in zip(projected, targets, strict=True)
    ]
    batch, students, _ = weights.shape
    return (weights * torch.stack([torch.stack(row, 1) for row in errors], 1)).sum() / (batch * students)


def sample_errors(own: Tensor, target: Tensor) -> Tensor:
    side = min(own.shape[2], target.shape[2])
    own, target = (m if m.shape[2] == side else F.adaptive_avg_pool2d(m, side) for m in (own, target))
    return F.mse_loss(own, target, reduction="none").flatten(1).mean(1)


def work(projected: Maps, targets: Maps, weights: Tensor) -> Work:
    own = sum(m.nbytes for row in projected for m in row)
    return Work(bytes=2 * (own + sum(m.nbytes for m in targets[0])) + own)


def case(batch: int, memory_format: str, pooled_before: bool) -> Case:
    loss = f"SemCKD MSE, {memory_format}, pooled {'before' if pooled_before else 'by the loss'}"
    arguments = batch, memory_format, pooled_before
    return Case(
        loss, batch, inputs, arguments, fused, {"textbook": textbook}, work, headline=batch == 64 and pooled_before
    )


CASES = (
    *(case(64, memory_format, pooled_before) for memory_format in FORMATS for pooled_before in (False, True)),
    *(case(batch, "NCHW", False) for batch in (16, 128)),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_feature_mse(compare, case):
    compare(case)
