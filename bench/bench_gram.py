"""Similarity matrices of VGG-8 and ResNet-32x4, as in SemCKD: ``pytest bench/bench_gram.py``.

The limit is the bytes that must move. Every map is read once, and once more for the student's gradient, which is
written.
"""

from __future__ import annotations

import pytest
import torch
from measure import Case, Work
from semckd import FORMATS, STUDENT, TEACHER, maps
from torch import Tensor

import kdkernels


def inputs(batch: int, memory_format: str) -> tuple[list[Tensor], Tensor]:
    features = [maps(batch, *layer, memory_format, learns=True) for layer in STUDENT]
    features += [maps(batch, *layer, memory_format) for layer in TEACHER]
    return features, torch.randn(len(features), batch, batch)


def fused(features: list[Tensor], slopes: Tensor) -> Tensor:
    return (kdkernels.similarity_matrices(features) * slopes).sum()


def textbook(features: list[Tensor], slopes: Tensor) -> Tensor:
    rows = [layer.reshape(len(layer), -1) for layer in features]
    return (torch.stack([row @ row.T for row in rows]) * slopes).sum()


def work(features: list[Tensor], slopes: Tensor) -> Work:
    return Work(bytes=sum(layer.nbytes * (3 if layer.requires_grad else 1) for layer in features))


CASES = tuple(
    Case(
        f"SemCKD similarities, {memory_format}",
        batch,
        inputs,
        (batch, memory_format),
        fused,
        {"textbook": textbook},
        work,
        headline=batch == 64,
    )
    for memory_format in FORMATS
    for batch in (64, 16, 128)
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gram(compare, case):
    compare(case)
