"""The number of kernel launches of each loss at the papers' sizes, which determines its cost. docs/benchmarks.md lists
it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels

from . import build

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
CIFAR = ((16, 32), (32, 16), (64, 8))  # (channels, side) of ResNet's maps, stage by stage
IMAGENET = ((64, 56), (128, 28), (256, 14), (512, 7))
STUDENT = ((128, 16), (256, 8), (512, 4), (512, 4))  # VGG-8, which learns from ResNet-32x4 in SemCKD
TEACHER = ((64, 32), (128, 16), (256, 8))
ALLOCATIONS = ("empty", "new_empty", "detach", "alias", "resolve", "lift")


class OfPyTorch(TorchDispatchMode):
    """Counts the PyTorch operations that launch kernels: all except views and allocations."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.__name__
        self.count += operation.namespace == "aten" and not operation.is_view and not name.startswith(ALLOCATIONS)
        return operation(*args, **(kwargs or {}))


Run = Callable[[], Tensor]


def maps(stages: Sequence[tuple[int, int]], dtype: torch.dtype = torch.float32, *, learns: bool) -> list[Tensor]:
    return [torch.zeros(64, c, side, side, dtype=dtype, requires_grad=learns) for c, side in stages]


def lkd(stages: Sequence[tuple[int, int]], k: int, dtype: torch.dtype = torch.float32, **settings: object) -> Run:
    student, teacher = (maps(stages, dtype, learns=learns) for learns in (True, False))
    return lambda: kdkernels.local_correlation_loss(student, teacher, k, **settings)


def pair(loss: Callable[..., Tensor], *shape: int, **settings: object) -> Run:
    student, teacher = torch.zeros(shape, requires_grad=True), torch.zeros(shape)
    return lambda: loss(student, teacher, **settings)


def cckd(kernel: str, **settings: object) -> Run:
    return pair(kdkernels.correlation_congruence_loss, 64, 128, kernel=kernel, **settings)


def similarities() -> Run:
    layers = maps(STUDENT, learns=True) + maps(TEACHER, learns=False)
    return lambda: kdkernels.similarity_matrices(layers)


def errors() -> Run:
    teacher = maps(TEACHER, learns=False)
    projected = [maps([(c, min(side, own)) for c, side in TEACHER], learns=True) for _, own in STUDENT]
    weights = torch.zeros(64, len(STUDENT), len(TEACHER), requires_grad=True)
    return lambda: kdkernels.cross_layer_mse(projected, [teacher] * len(STUDENT), weights)


# The kernels of a pass and, after a plus, the PyTorch operations.
LOSSES = {
    "LKD, the stages of CIFAR, k=4": (lambda: lkd(CIFAR, 4), "4", "1"),
    "LKD, CIFAR in bfloat16": (lambda: lkd(CIFAR, 4, torch.bfloat16), "4", "1 + 3"),
    "LKD, CIFAR with attention": (
        lambda: lkd(CIFAR, 4, mask=[torch.zeros(64, side, side) for _, side in CIFAR], threshold=0.5),
        "5",
        "2",
    ),
    "LKD, the stages of ImageNet, k=3": (lambda: lkd(IMAGENET, 3, partition="resize"), "4", "1"),
    "CCKD, Taylor series": (lambda: cckd("taylor_rbf"), "4", "0 + 1"),
    "CCKD, Gaussian": (lambda: cckd("rbf"), "4", "0 + 1"),
    "CCKD, Gaussian, embeddings not normalised": (lambda: cckd("rbf", normalize=False), "6", "0 + 1"),
    "CCKD, bilinear": (lambda: cckd("bilinear"), "4", "0 + 1"),
    "CCKD, MMD": (lambda: cckd("mmd"), "3", "0 + 1"),
    "ICCT, K=1000": (lambda: pair(kdkernels.inter_class_correlation_loss, 256, 1000), "3", "0 + 1"),
    "ICCT, K=100, per sample": (
        lambda: pair(kdkernels.inter_class_correlation_loss, 64, 100, per_sample=True),
        "3",
        "0 + 1",
    ),
    "SemCKD, similarities of seven layers": (similarities, "2", "2"),
    "SemCKD, errors of twelve pairs": (errors, "2", "1 + 1"),
    "KD, K=1000": (lambda: pair(kdkernels.kd_loss, 256, 1000), "2", "0 + 1"),
    "FitNet's hint": (lambda: pair(kdkernels.hint_loss, 64, 128, 8, 8), "2 + 1", "1"),
}


def counted(run: Callable[[], object]) -> str:
    build.launches()
    with OfPyTorch() as others:
        run()
    return " + ".join([str(build.launches()), *([str(others.count)] if others.count else [])])


@pytest.mark.parametrize("name", LOSSES)
def test_launches(name: str) -> None:
    prepare, *expected = LOSSES[name]
    losses = []
    with build.only_counting(), kdkernels.use_backend("native"):
        run = prepare()
        forward = counted(lambda: losses.append(run()))
        grad = torch.zeros_like(losses[0])
        assert [forward, counted(lambda: losses[0].backward(grad))] == expected


def test_the_page_says_so() -> None:
    rows = [f"| {name} | {forward} | {backward} |" for name, (_, forward, backward) in LOSSES.items()]
    assert "\n".join(["| --- | ---: | ---: |", *rows, ""]) in PAGE.read_text()
