"""``similarity_preserving``"""

from __future__ import annotations

import pytest
from helpers import assert_matches, exactly, loss_and_gradients, relative_error
from torch import Tensor

import kdkernels

from . import draw

every_form = pytest.mark.parametrize("form", ["gram", "feature"])


def loss_of(form: str, backend: str = "triton", reduction: str = "mean"):
    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return kdkernels.similarity_preserving_loss(student, teacher, form=form, reduction=reduction, backend=backend)

    return loss


def different(device: str, student: tuple, teacher: tuple) -> list[Tensor]:
    """Return features whose similarities differ. Two samples may have equal similarities by chance, and then the norms
    of the feature form cancel. One sample always has.
    """
    while True:
        features = [draw(*shape, device=device).requires_grad_() for shape in (student, teacher)]
        if student[0] == 1 or loss_of("gram", "reference", "sum")(*exactly(*features)) > 0.03:
            return features


def compare(student: Tensor, teacher: Tensor, form: str, reduction: str = "mean") -> None:
    assert_matches(loss_of(form, reduction=reduction), loss_of("gram", "reference", reduction), student, teacher)


@every_form
@pytest.mark.parametrize(
    ("student", "teacher"),
    [((1, 4), (1, 1)), ((2, 200), (2, 3)), ((67, 5), (67, 2, 1, 3)), ((130, 3), (130, 9))],
    ids=str,
)
def test_similarity_preserving_of_odd_shapes(device: str, form: str, student: tuple, teacher: tuple) -> None:
    features = [draw(*shape, device=device).requires_grad_() for shape in (student, teacher)]
    if form == "feature":
        features = different(device, student, teacher)
    compare(*features, form, reduction="sum")


@every_form
def test_similarity_preserving_of_zero_and_duplicate_samples(device: str, form: str) -> None:
    x, y = draw(9, 5, device=device), draw(9, 7, device=device)
    x[1] = x[4]
    x[6] = y[0] = y[6] = 0
    compare(x.requires_grad_(), y.requires_grad_(), form)


def test_similarity_preserving_of_a_good_student(device: str) -> None:
    """The Gram form compares entry by entry, so no large sums cancel."""
    teacher = draw(12, 30, device=device).relu() + 0.5
    student = (teacher + 1e-3 * draw(12, 30, device=device)).requires_grad_()
    loss, (gradient, _) = loss_and_gradients(loss_of("gram"), student, teacher)
    exact, (correct, _) = loss_and_gradients(loss_of("gram", "reference"), *exactly(student, teacher))
    assert relative_error(loss, exact) < 1e-3
    assert relative_error(gradient, correct) < 1e-2
