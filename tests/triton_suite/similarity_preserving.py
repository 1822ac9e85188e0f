"""``similarity_preserving``"""

from __future__ import annotations

import pytest
import torch
from helpers import assert_matches, exactly, loss_and_gradients, relative_error
from torch import Tensor

import kdkernels

from . import draw, laid_out

every_form = pytest.mark.parametrize("form", ["gram", "feature"])


def loss_of(form: str, backend: str = "triton", reduction: str = "mean"):
    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return kdkernels.similarity_preserving_loss(student, teacher, form=form, reduction=reduction, backend=backend)

    return loss


def different(device: str, student: tuple, teacher: tuple) -> list[Tensor]:
    """Features whose similarities are not alike by chance, as those of two samples may be: then the norms of the
    feature form cancel. One sample is always like another."""
    while True:
        features = [draw(*shape, device=device).requires_grad_() for shape in (student, teacher)]
        if student[0] == 1 or loss_of("gram", "reference", "sum")(*exactly(*features)) > 0.03:
            return features


def compare(student: Tensor, teacher: Tensor, form: str, reduction: str = "mean") -> None:
    assert_matches(loss_of(form, reduction=reduction), loss_of("gram", "reference", reduction), student, teacher)


@every_form
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32, torch.float32), (torch.float64, torch.float16), (torch.bfloat16, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "transposed"])
def test_similarity_preserving(device: str, form: str, dtypes: tuple[torch.dtype, torch.dtype], layout: str) -> None:
    student, teacher = (
        laid_out(draw(19, c, h, w, device=device, dtype=dtype), layout).requires_grad_()
        for dtype, (c, h, w) in zip(dtypes, ((3, 4, 5), (7, 2, 3)), strict=True)
    )
    compare(student, teacher, form)


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
@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=str)
def test_similarity_preserving_with_the_gradients_wanted(device: str, form: str, wanted: tuple[bool, bool]) -> None:
    compare(*(draw(9, 6, device=device).requires_grad_(want) for want in wanted), form)


@every_form
def test_similarity_preserving_of_zero_and_duplicate_samples(device: str, form: str) -> None:
    x, y = draw(9, 5, device=device), draw(9, 7, device=device)
    x[1] = x[4]
    x[6] = y[0] = y[6] = 0
    compare(x.requires_grad_(), y.requires_grad_(), form)


def test_similarity_preserving_of_a_good_student(device: str) -> None:
    """The Gram form compares entry by entry: nothing of the size of the whole cancels."""
    teacher = draw(12, 30, device=device).relu() + 0.5
    student = (teacher + 1e-3 * draw(12, 30, device=device)).requires_grad_()
    loss, (gradient, _) = loss_and_gradients(loss_of("gram"), student, teacher)
    exact, (correct, _) = loss_and_gradients(loss_of("gram", "reference"), *exactly(student, teacher))
    assert relative_error(loss, exact) < 1e-3
    assert relative_error(gradient, correct) < 1e-2


@every_form
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_similarity_preserving_of_broken_samples(device: str, form: str, value: float) -> None:
    for n in (1, 20):
        for place in range(2):
            features = [draw(n, 5, device=device) for _ in range(2)]
            features[place][-1, 3] = value
            assert loss_of(form)(*features).isnan()
