"""SP's loss against its definition in float64, and its contracts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, assert_matches, exactly, loss_and_gradients, relative_error
from torch import Tensor

import kdkernels
from kdkernels import native

FORMS = ("gram", "feature")
every_form = pytest.mark.parametrize("form", FORMS)
needs_native = pytest.mark.skipif(
    native.why_not(torch.device("cpu")) is not None, reason=str(native.why_not(torch.device("cpu")))
)


def definition(student: Tensor, teacher: Tensor, reduction: str = "mean") -> Tensor:
    """Return the loss from every sample's products with all samples, divided by their norm, row by row."""
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
    """Assert that the loss and both gradients equal the definition's, in the right dtypes."""

    assert_matches(
        lambda s, t: kdkernels.similarity_preserving_loss(s, t, form=form, reduction=reduction, backend=backend),
        lambda s, t: definition(s, t, reduction),
        student,
        teacher,
    )


@every_form
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [((2, 5), (2, 9)), ((7, 3), (7, 2, 3)), ((12, 4, 3, 2), (12, 2, 5, 5)), ((40, 6), (40, 3, 1, 2)), ((1, 4), (1, 3))],
    ids=str,
)
def test_matches_the_definition(backend, form, reduction, student, teacher):
    check(backend, maps(*student), maps(*teacher), form, reduction)


@every_form
@pytest.mark.parametrize("rows", [300, 700])
def test_many_rows(form, rows):
    """Small Gram matrices are kept. Large ones are computed twice, in strips."""
    x, y = maps(rows, 24), maps(rows, 40)

    def loss_of(form: str, backend: str):
        return lambda s, t: kdkernels.similarity_preserving_loss(s, t, form=form, backend=backend)

    assert_matches(loss_of(form, "auto"), loss_of("gram", "reference"), x, y)


@every_form
def test_zero_and_duplicate_samples(backend, form):
    x, y = maps(9, 5, requires_grad=False), maps(9, 7, requires_grad=False)
    x[1] = x[4]
    x[6] = y[0] = y[6] = 0
    student, teacher = x.requires_grad_(), y.requires_grad_()
    loss, gradients = loss_and_gradients(
        lambda s, t: kdkernels.similarity_preserving_loss(s, t, form=form, backend=backend), student, teacher
    )
    assert_close(loss, definition(*exactly(student, teacher)).detach())
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_good_student_keeps_its_digits(backend):
    """The Gram form compares entry by entry, so no large sums cancel."""
    teacher = maps(12, 30, requires_grad=False).relu() + 0.5
    student = (teacher + 1e-3 * torch.randn(12, 30)).requires_grad_()
    loss, (gradient,) = loss_and_gradients(
        lambda s: kdkernels.similarity_preserving_loss(s, teacher, form="gram", backend=backend), student
    )
    exact, (correct,) = loss_and_gradients(lambda s: definition(s, teacher.double()), *exactly(student))
    assert relative_error(loss, exact) < 1e-3
    assert relative_error(gradient, correct) < 1e-2


@needs_native
def test_nearly_collinear_features_keep_the_digits_of_textbook_code():
    """The rows of both matrices are nearly equal. The errors of their norms must not remain in the gradient."""

    def collinear() -> Tensor:
        return torch.randn(400) + 0.1 * torch.randn(256, 400)

    def textbook(student: Tensor, teacher: Tensor) -> Tensor:
        return (F.normalize(student @ student.T) - F.normalize(teacher @ teacher.T)).square().mean()

    def native(student: Tensor, teacher: Tensor) -> Tensor:
        return kdkernels.similarity_preserving_loss(student, teacher, form="gram", backend="native")

    errors = {textbook: 0.0, native: 0.0}
    for _ in range(8):
        inputs = collinear().requires_grad_(), collinear()
        _, (correct, _) = loss_and_gradients(textbook, *exactly(*inputs))
        for loss in errors:
            errors[loss] += relative_error(loss_and_gradients(loss, *inputs)[1][0], correct)
    assert errors[native] < 2.5 * errors[textbook]


def test_no_overflow_where_half_precision_has_it(backend):
    """Gram entries of 256 x 8 x 8 maps with a root mean square of 2 exceed the range of float16."""
    student = (2 * torch.randn(6, 256, 8, 8)).half().requires_grad_()
    with torch.autocast("cpu", torch.float16):
        loss = kdkernels.similarity_preserving_loss(student, maps(6, 10), backend=backend)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_module_and_backend_block(backend):
    student, teacher = maps(4, 8), maps(4, 8)
    with kdkernels.use_backend(backend):
        loss = kdkernels.nn.SimilarityPreservingLoss(reduction="sum")(student, teacher)
    assert_close(loss, definition(*exactly(student, teacher), reduction="sum").detach())


@pytest.mark.parametrize(
    ("student", "teacher", "settings", "error", "message"),
    [
        ([1.0], torch.ones(2, 3), {}, TypeError, "student must be a tensor, got list"),
        (torch.ones(3), torch.ones(3, 2), {}, ValueError, r"student must have shape n x ..., got \(3,\)"),
        (torch.ones(2, 3), torch.ones(2, 3).int(), {}, TypeError, "teacher must be float32.*got torch.int32"),
        (torch.ones(2, 3), torch.ones(4, 3), {}, ValueError, "teacher must have student's batch size 2, got 4"),
        (torch.ones(2, 0), torch.ones(2, 3), {}, ValueError, "student must not be empty"),
        (torch.ones(2, 3), torch.ones(2, 3), {"reduction": "none"}, ValueError, "reduction must be one of"),
        (torch.ones(2, 3), torch.ones(2, 3), {"form": "tiles"}, ValueError, "form must be one of"),
    ],
)
def test_misuse_is_explained(student, teacher, settings, error, message):
    with pytest.raises(error, match=message):
        kdkernels.similarity_preserving_loss(student, teacher, **settings)


def test_explanation(backend):
    """It names the backend and the cheaper form. Wrong arguments raise the same errors as the call."""
    wide, narrow = (maps(20, width) for width in (400, 3))
    for student, expected in ((wide, "gram"), (narrow, "feature")):
        explanation = kdkernels.explain("similarity_preserving_loss", student, student, backend=backend)
        assert explanation.backend == backend
        ((part,),) = explanation.stages
        assert str(part.form) == expected
        assert part.costs[part.form] == min(part.costs.values())
    with pytest.raises(ValueError, match="batch size 20, got 2"):
        kdkernels.explain("similarity_preserving_loss", wide, narrow[:2])
