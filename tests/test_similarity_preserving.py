"""SP's loss against its definition in float64, and its contracts."""

from __future__ import annotations

import pytest
import torch
from helpers import HALF_DTYPES, assert_as_good_as, assert_close, exactly, loss_and_gradients
from torch import Tensor

import kdkernels

FORMS = ("gram", "feature")
every_form = pytest.mark.parametrize("form", FORMS)


def definition(student: Tensor, teacher: Tensor, reduction: str = "mean") -> Tensor:
    """Every sample's products with all the others, divided by their norm, row by row."""
    total = 0.0
    for i in range(len(student)):
        rows = []
        for features in (student, teacher):
            similarities = torch.stack([(features[i] * other).sum() for other in features])
            rows.append(similarities / similarities.square().sum().sqrt() if bool(similarities.any()) else similarities)
        total = total + (rows[0] - rows[1]).square().sum()
    return total / len(student) ** 2 if reduction == "mean" else total


def maps(*shape: int, dtype: torch.dtype = torch.float32, requires_grad: bool = True) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_(requires_grad)


def check(backend: str, student: Tensor, teacher: Tensor, form: str = "auto", reduction: str = "mean") -> None:
    """Loss and both gradients equal the definition's, in the right dtypes."""

    def fused(s: Tensor, t: Tensor) -> Tensor:
        return kdkernels.similarity_preserving_loss(s, t, form=form, reduction=reduction, backend=backend)

    loss, gradients = loss_and_gradients(fused, student, teacher)
    exact_loss, exact_gradients = loss_and_gradients(
        lambda s, t: definition(s, t, reduction), *exactly(student, teacher)
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


@every_form
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [((2, 5), (2, 9)), ((7, 3), (7, 2, 3)), ((12, 4, 3, 2), (12, 2, 5, 5)), ((40, 6), (40, 3, 1, 2)), ((1, 4), (1, 3))],
    ids=str,
)
def test_matches_the_definition(backend, form, reduction, student, teacher):
    check(backend, maps(*student), maps(*teacher), form, reduction)
