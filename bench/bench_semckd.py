"""The whole loss of SemCKD with attention and projections: ``pytest bench/bench_semckd.py``.

Nearly all of its work is the convolutions of the projections: the loss, the gradient to the inputs, and the gradient to
the weights. The limit is the rate of this machine's matrix products for them. Variants agree less than in other
benchmarks, because rounding moves numbers across the zero of a ReLU, which changes their gradient.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bench_feature_mse import sample_errors
from measure import Case, Work
from semckd import FORMATS, STUDENT, TEACHER, maps
from torch import Tensor, nn

from kdkernels.nn import SemanticCalibration, SemCKDLoss

Maps = list[Tensor]


def inputs(batch: int, memory_format: str) -> tuple[SemanticCalibration, Maps, Maps, list[Tensor]]:
    channels = ([channels for channels, _ in layers] for layers in (STUDENT, TEACHER))
    calibration = SemanticCalibration(*channels, batch).to(memory_format=FORMATS[memory_format])
    student = [maps(batch, *layer, memory_format, learns=True) for layer in STUDENT]
    return calibration, student, [maps(batch, *layer, memory_format) for layer in TEACHER], [*calibration.parameters()]


def fused(calibration: SemanticCalibration, student: Maps, teacher: Maps, parameters: list[Tensor]) -> Tensor:
    return SemCKDLoss()(*calibration(student, teacher))


def textbook(calibration: SemanticCalibration, student: Maps, teacher: Maps, parameters: list[Tensor]) -> Tensor:
    """Return the loss with the same parameters in plain PyTorch, layer by layer and pair by pair."""
    keys = torch.stack([embedded(e.linears, m) for e, m in zip(calibration.keys, teacher, strict=True)], 1)
    queries = torch.stack([embedded(e.linears, m) for e, m in zip(calibration.queries, student, strict=True)], 1)
    attention = (queries @ keys.mT).softmax(-1)
    errors = []
    for own, projections in zip(student, calibration.projections, strict=True):
        for target, projection in zip(teacher, projections, strict=True):
            side = min(own.shape[2], target.shape[2])
            pooled = own if own.shape[2] == side else F.adaptive_avg_pool2d(own, side)
            errors.append(sample_errors(projection(pooled), target))
    return (attention.flatten(1) * torch.stack(errors, 1)).sum() / (len(attention) * len(student))


def embedded(linears: nn.ModuleList, features: Tensor) -> Tensor:
    rows = features.reshape(len(features), -1)
    first, second = linears
    return F.normalize(second(first(rows @ rows.T).relu()))


def work(calibration: SemanticCalibration, student: Maps, teacher: Maps, parameters: list[Tensor]) -> Work:
    forward = 0
    for own in student:
        for target in teacher:
            pixels = len(own) * min(own.shape[2], target.shape[2]) ** 2
            inner = 2 * target.shape[1]
            forward += pixels * inner * (own.shape[1] + 9 * inner + target.shape[1])
    return Work(multiply_adds=3 * forward)


def case(memory_format: str) -> Case:
    arguments = 64, memory_format
    return Case(
        f"SemCKD, {memory_format}",
        64,
        inputs,
        arguments,
        fused,
        {"textbook": textbook},
        work,
        headline=True,
        agreement=2e-2,
    )


CASES = tuple(map(case, FORMATS))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_semckd(compare, case):
    compare(case)
