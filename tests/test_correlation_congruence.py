"""CCKD's loss and its kernels against definitions in float64, pair by pair, and the contracts."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from helpers import HALF_DTYPES, assert_as_good_as, assert_close, exactly, loss_and_gradients
from torch import Tensor

import kdkernels
from kdkernels import native

KERNELS = ("taylor_rbf", "rbf", "bilinear", "mmd")
every_kernel = pytest.mark.parametrize("kernel", KERNELS)

needs_native = pytest.mark.skipif(
    native.why_not(torch.device("cpu")) is not None, reason=str(native.why_not(torch.device("cpu")))
)


def correlation(x: Tensor, y: Tensor, kernel: str, gamma: float, order: int) -> Tensor:
    """κ of two vectors, term by term."""
    if kernel == "taylor_rbf":
        terms = ((2 * gamma) ** p / math.factorial(p) * (x * y).sum() ** p for p in range(order + 1))
        return math.exp(-2 * gamma) * sum(terms)
    if kernel == "rbf":
        return torch.exp(-gamma * ((x - y) ** 2).sum())
    return (x * y).sum() if kernel == "bilinear" else (x.sum() / len(x) - y.sum() / len(y)).abs()


def unit(x: Tensor) -> Tensor:
    norm = (x * x).sum().sqrt() if bool(x.any()) else 1.0
    return x / norm


def definition(
    student: Tensor, teacher: Tensor, kernel="taylor_rbf", gamma=0.4, order=2, normalize=True, reduction="mean"
) -> Tensor:
    """A loop over pairs of rows, each compared by the equations."""
    rows = [[unit(row) if normalize else row for row in features] for features in (student, teacher)]
    n, total = len(student), 0.0
    for i, j in product(range(n), repeat=2):
        of_student, of_teacher = (correlation(r[i], r[j], kernel, gamma, order) for r in rows)
        total = total + (of_student - of_teacher) ** 2
    return total / n**2 if reduction == "mean" else total


def embeddings(*shape: int, dtype: torch.dtype = torch.float32, requires_grad: bool = True) -> Tensor:
    """Of norm about 1, that kernels without normalisation are neither 0 nor infinite."""
    return (torch.randn(shape) / math.sqrt(shape[1])).to(dtype).requires_grad_(requires_grad)


def check(backend: str, student: Tensor, teacher: Tensor, form: str = "auto", **settings) -> None:
    """Loss and both gradients equal the definition's, in the right dtypes."""

    def fused(s: Tensor, t: Tensor) -> Tensor:
        return kdkernels.correlation_congruence_loss(s, t, form=form, backend=backend, **settings)

    loss, gradients = loss_and_gradients(fused, student, teacher)
    exact_loss, exact_gradients = loss_and_gradients(
        lambda s, t: definition(s, t, **settings), *exactly(student, teacher)
    )
    assert loss.dtype == (torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32)
    assert_close(loss, exact_loss, "loss")
    names = ("gradient to the student", "gradient to the teacher")
    for name, leaf, gradient, expected in zip(names, (student, teacher), gradients, exact_gradients, strict=True):
        if expected is None:
            assert gradient is None
            continue
        assert gradient.dtype == leaf.dtype
        if leaf.dtype in HALF_DTYPES:
            assert_as_good_as(gradient, expected.to(leaf.dtype), expected, name)
        else:
            assert_close(gradient, expected, name)


@pytest.mark.parametrize("normalize", [True, False], ids=["unit rows", "raw rows"])
@pytest.mark.parametrize("shape", [(2, 6, 3), (9, 5, 17), (19, 33, 8)], ids=str)
@every_kernel
def test_matches_the_definition(backend, kernel, shape, normalize):
    n, width_s, width_t = shape
    check(backend, embeddings(n, width_s), embeddings(n, width_t), kernel=kernel, normalize=normalize)
