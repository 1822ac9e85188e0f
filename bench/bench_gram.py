"""Similarity matrices of VGG-8 and ResNet-32x4 against eager and compiled PyTorch: ``pytest bench/bench_gram.py``.

Measured as in bench_kd.py. The limit is this machine's memory bandwidth on the bytes that must move: every map is read,
and read again for the gradient of the student's, which is written.
"""

from __future__ import annotations

import pytest
import torch
from measure import bandwidth, compare, compiled, peaks
from semckd import FORMATS, STUDENT, TEACHER, maps
from torch import Tensor

import kdkernels


def inputs(memory_format: str) -> tuple[list[Tensor], Tensor]:
    features = [maps(*layer, memory_format, learns=True) for layer in STUDENT]
    features += [maps(*layer, memory_format) for layer in TEACHER]
    return features, torch.randn(len(features), len(features[0]), len(features[0]))


def fused(features: list[Tensor], slopes: Tensor) -> Tensor:
    return (kdkernels.similarity_matrices(features) * slopes).sum()


def textbook(features: list[Tensor], slopes: Tensor) -> Tensor:
    rows = [layer.reshape(len(layer), -1) for layer in features]
    return (torch.stack([row @ row.T for row in rows]) * slopes).sum()


BASELINES = {"textbook": textbook}
VARIANTS = {"fused": fused, **BASELINES}


@pytest.mark.parametrize("memory_format", FORMATS)
def test_gram(benchmark, memory_format):
    tensors = inputs(memory_format)
    size = sum(layer.nbytes * (3 if layer.requires_grad else 1) for layer in tensors[0])
    memory = peaks(VARIANTS, inputs, memory_format)
    compare(benchmark, VARIANTS | compiled(BASELINES), tensors, limit=size / bandwidth(), peaks=memory)
