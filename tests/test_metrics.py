"""The metrics against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import DTYPES, assert_close

import kdkernels


def cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """Return HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)) with the n x n centring matrix, in NumPy float64."""
    rows = [features.double().numpy().reshape(len(features), -1) for features in (x, y)]
    centring = np.eye(len(x)) - 1 / len(x)
    k, l = (centring @ (r @ r.T) @ centring for r in rows)  # noqa: E741
    return np.trace(k @ l) / math.sqrt(np.trace(k @ k) * np.trace(l @ l))


@pytest.mark.parametrize("form", ["auto", "feature", "gram"])
@pytest.mark.parametrize(
    ("n", "x", "y"), [(2, (1,), (3,)), (50, (4,), (7,)), (9, (3, 5, 5), (40,)), (64, (64,), (2, 3))]
)
def test_linear_cka(form, n, x, y):
    x, y = torch.randn(n, *x) + 3, torch.randn(n, *y)
    assert_close(kdkernels.linear_cka(x, y, form=form), torch.tensor(cka(x, y)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_cka_dtypes(dtype):
    x, y = (torch.randn(20, 9).to(dtype) for _ in range(2))
    result = kdkernels.linear_cka(x, y)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(result, torch.tensor(cka(x, y)))


def test_linear_cka_does_not_change_with_rotation_scale_and_shift():
    x = torch.randn(30, 8)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    assert_close(kdkernels.linear_cka(x, 1e-12 * x @ rotation), torch.ones(()))
    assert_close(kdkernels.linear_cka(1e12 * x, x @ rotation + 5), torch.ones(()))
    assert kdkernels.linear_cka(x, torch.ones(30, 4)).isnan()
    x[3, 3] = torch.nan
    assert kdkernels.linear_cka(x, rotation.repeat(4, 1)[:30]).isnan()


def test_linear_cka_has_a_gradient():
    x, y = torch.randn(9, 4, dtype=torch.float64, requires_grad=True), torch.randn(9, 5, dtype=torch.float64)
    for form in ("feature", "gram"):
        assert torch.autograd.gradcheck(lambda x, form=form: kdkernels.linear_cka(x, y, form=form), x)


@pytest.mark.parametrize("per_sample", [True, False])
def test_semantic_mismatch_score(per_sample):
    student, teacher = torch.randn(3, 5, 5), torch.randn(2, 5, 5)
    weights = torch.rand(5, 3, 2) if per_sample else torch.rand(3, 2)
    expected = 0.0
    for i in range(3):
        for j in range(2):
            for n in range(5):
                weight = weights[n, i, j] if per_sample else weights[i, j]
                expected += weight.double() * (student[i, n] - teacher[j, n]).double().square().mean() / 5 / 6
    assert_close(kdkernels.semantic_mismatch_score(student, teacher, weights), expected)


def test_semantic_mismatch_score_of_chosen_pairs():
    """The other methods are measured with α = 1 for the pairs that were chosen by hand."""
    student, teacher = torch.randn(3, 4, 4), torch.randn(2, 4, 4)
    expected = ((student[0] - teacher[0]).square().mean() + (student[2] - teacher[1]).square().mean()) / 2
    assert_close(kdkernels.semantic_mismatch_score(student, teacher, pairs=[(0, 0), (2, 1)]), expected.double())
    assert kdkernels.semantic_mismatch_score(student, student, pairs=[(i, i) for i in range(3)]) == 0


def test_average_relative_improvement():
    """The best case that the paper names: VGG-8 from ResNet-32x4 over AT, 242 % (its Table 2 rounds the accuracies)."""
    assert kdkernels.average_relative_improvement([75.27], [71.90], [70.46]) == pytest.approx(234.03, abs=0.01)
    assert kdkernels.average_relative_improvement([75.0, 80.0], [73.0, 78.0], [71.0, 77.0]) == pytest.approx(150.0)
    assert math.isinf(kdkernels.average_relative_improvement([75.0], [73.0], [73.0]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kdkernels.linear_cka(torch.ones(1, 3), torch.ones(1, 3)), "x must have at least 2 samples"),
        (lambda: kdkernels.linear_cka(torch.ones(2, 3), torch.ones(3, 3)), "y must have x's batch size 2, got 3"),
        (lambda: kdkernels.linear_cka(torch.ones(2, 3), torch.ones(2, 3), form="x"), "form must be one of"),
        (
            lambda: kdkernels.semantic_mismatch_score(torch.ones(1, 3, 3), torch.ones(1, 4, 4)),
            r"teacher must hold 3 x 3 matrices, got shape \(1, 4, 4\)",
        ),
        (
            lambda: kdkernels.semantic_mismatch_score(torch.ones(1, 3, 3), torch.ones(2, 3, 3), torch.ones(2, 2)),
            r"weights must have shape \(3, 1, 2\) or \(1, 2\), got \(2, 2\)",
        ),
        (
            lambda: kdkernels.semantic_mismatch_score(torch.ones(1, 3, 3), torch.ones(2, 3, 3), pairs=[(1, 0)]),
            r"pairs must be pairs of layers below \(1, 2\)",
        ),
        (lambda: kdkernels.average_relative_improvement([1.0], [1.0, 2.0], [1.0]), r"one length.*\(1,\), \(2,\)"),
        (lambda: kdkernels.average_relative_improvement(74.0, 73.0, 70.0), r"one length.*got shapes \[\(\), "),
        (
            lambda: kdkernels.semantic_mismatch_score(torch.ones(1, 3, 3), torch.ones(2, 3, 3), pairs=[0]),
            r"pairs must be pairs of layers .*got \[0\]",
        ),
    ],
)
def test_misuse_is_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()
