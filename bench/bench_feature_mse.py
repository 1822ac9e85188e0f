"""SemCKD's loss of all layer pairs against eager and compiled PyTorch: ``pytest bench/bench_feature_mse.py``.

Measured as in bench_kd.py. The student's projections have its own map sizes, or the smaller of both where it pools
before it projects. The limit is this machine's memory bandwidth on the bytes that must move: every map is read twice,
since the gradients, which are written, come in the backward pass. Memory is that beside the gradients.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from measure import bandwidth, compare, compiled, peaks
from semckd import BATCH, FORMATS, STUDENT, TEACHER, maps
from torch import Tensor

import kdkernels

Maps = list[list[Tensor]]


def inputs(memory_format: str, pooled_before: bool) -> tuple[Maps, Maps, Tensor]:
    teacher = [maps(*layer, memory_format) for layer in TEACHER]
    projected = [
        [maps(c, min(side, height) if pooled_before else side, memory_format, learns=True) for c, height in TEACHER]
        for _, side in STUDENT
    ]
    weights = torch.softmax(torch.randn(BATCH, len(STUDENT), len(TEACHER)), dim=2)
    return projected, [teacher] * len(STUDENT), weights.requires_grad_()


def fused(projected: Maps, targets: Maps, weights: Tensor) -> Tensor:
    return kdkernels.cross_layer_mse(projected, targets, weights)


def textbook(projected: Maps, targets: Maps, weights: Tensor) -> Tensor:
    errors = [
        [_error(own, target) for own, target in zip(*layers, strict=True)]
        for layers in zip(projected, targets, strict=True)
    ]
    batch, students, _ = weights.shape
    return (weights * torch.stack([torch.stack(row, 1) for row in errors], 1)).sum() / (batch * students)


def _error(own: Tensor, target: Tensor) -> Tensor:
    side = min(own.shape[2], target.shape[2])
    own, target = (m if m.shape[2] == side else F.adaptive_avg_pool2d(m, side) for m in (own, target))
    return F.mse_loss(own, target, reduction="none").flatten(1).mean(1)


BASELINES = {"textbook": textbook}
VARIANTS = {"fused": fused, **BASELINES}


@pytest.mark.parametrize("pooled_before", [False, True], ids=["pooled by the loss", "pooled before"])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_feature_mse(benchmark, memory_format, pooled_before):
    torch.compiler.reset()  # sizes that change would be compiled as unknown, which PyTorch 2.13 cannot do here
    tensors = inputs(memory_format, pooled_before)
    projected, targets, _ = tensors
    read = sum(m.nbytes for row in projected for m in row) + sum(m.nbytes for m in targets[0])
    written = sum(m.nbytes for row in projected for m in row)
    memory = {name: peak - written for name, peak in peaks(VARIANTS, inputs, memory_format, pooled_before).items()}
    limit = (2 * read + written) / bandwidth()
    compare(benchmark, VARIANTS | compiled(BASELINES), tensors, limit=limit, peaks=memory)
