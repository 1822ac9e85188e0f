"""CCKD's loss and its kernels against definitions in float64, pair by pair, and its contracts."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from helpers import HALF_DTYPES, assert_close, assert_matches, exactly, loss_and_gradients
from torch import Tensor

import kdkernels
from kdkernels import native

KERNELS = ("taylor_rbf", "rbf", "bilinear", "mmd")
every_kernel = pytest.mark.parametrize("kernel", KERNELS)

needs_native = pytest.mark.skipif(
    native.why_not(torch.device("cpu")) is not None, reason=str(native.why_not(torch.device("cpu")))
)


def correlation(x: Tensor, y: Tensor, kernel: str, gamma: float, order: int) -> Tensor:
    """Return κ of two vectors, term by term."""
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
    """Return the loss from a loop over pairs of rows."""
    rows = [[unit(row) if normalize else row for row in features] for features in (student, teacher)]
    n, total = len(student), 0.0
    for i, j in product(range(n), repeat=2):
        of_student, of_teacher = (correlation(r[i], r[j], kernel, gamma, order) for r in rows)
        total = total + (of_student - of_teacher) ** 2
    return total / n**2 if reduction == "mean" else total


def embeddings(*shape: int, dtype: torch.dtype = torch.float32, requires_grad: bool = True) -> Tensor:
    """Return embeddings of norm about 1, so that kernels without normalisation are neither 0 nor infinite."""
    return (torch.randn(shape) / math.sqrt(shape[1])).to(dtype).requires_grad_(requires_grad)


def check(backend: str, student: Tensor, teacher: Tensor, form: str = "auto", **settings) -> None:
    """Assert that the loss and both gradients equal the definition's, in the right dtypes."""

    assert_matches(
        lambda s, t: kdkernels.correlation_congruence_loss(s, t, form=form, backend=backend, **settings),
        lambda s, t: definition(s, t, **settings),
        student,
        teacher,
    )


@pytest.mark.parametrize("normalize", [True, False], ids=["unit rows", "raw rows"])
@pytest.mark.parametrize("shape", [(2, 6, 3), (9, 5, 17), (19, 33, 8)], ids=str)
@every_kernel
def test_matches_the_definition(backend, kernel, shape, normalize):
    n, width_s, width_t = shape
    check(backend, embeddings(n, width_s), embeddings(n, width_t), kernel=kernel, normalize=normalize)


@pytest.mark.parametrize("normalize", [True, False], ids=["unit rows", "raw rows"])
@pytest.mark.parametrize("order", [0, 1, 3, 5])
@pytest.mark.parametrize("gamma", [0.4, 1.5])
def test_orders_of_the_expansion(backend, order, gamma, normalize):
    check(backend, embeddings(11, 6), embeddings(11, 4), order=order, gamma=gamma, normalize=normalize)


def test_high_orders_are_the_rbf_kernel(backend):
    """The expansion of Eq. 9 holds for unit vectors."""
    x, y = embeddings(9, 5), embeddings(9, 5)
    losses = [
        kdkernels.correlation_congruence_loss(x, y, kernel=kernel, order=40, backend=backend)
        for kernel in ("taylor_rbf", "rbf")
    ]
    assert_close(losses[0], losses[1].double())


@every_kernel
def test_sum(backend, kernel):
    check(backend, embeddings(7, 5), embeddings(7, 3), kernel=kernel, reduction="sum")


@pytest.mark.parametrize("form", ["gram", "feature"])
@pytest.mark.parametrize("normalize", [True, False], ids=["unit rows", "raw rows"])
def test_forms_of_the_bilinear_kernel(backend, form, normalize):
    check(backend, embeddings(12, 5), embeddings(12, 8), form=form, kernel="bilinear", normalize=normalize)


def apart(rows: Tensor, normalize: bool) -> Tensor:
    """Return the rows whose means differ clearly. At equal means, the derivative of mmd jumps."""
    means = (F.normalize(rows.double()) if normalize else rows.double()).mean(1)
    by_mean = means.argsort()
    near = by_mean[1:][means[by_mean].diff() < 1e-7]
    return rows[~torch.isin(torch.arange(len(rows)), near)]


@pytest.mark.parametrize("normalize", [True, False], ids=["unit rows", "raw rows"])
@pytest.mark.parametrize("rows", [65, 700, 1100])
@every_kernel
def test_many_rows(kernel, rows, normalize):
    """There is more than one strip, and the last one is short."""
    x, y = (apart(embeddings(rows + 40, width), normalize)[:rows] for width in (24, 40))
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()

    def loss_of(backend: str):
        return lambda s, t: kdkernels.correlation_congruence_loss(
            s, t, kernel=kernel, form="gram", normalize=normalize, backend=backend
        )

    assert_matches(loss_of("auto"), loss_of("reference"), x, y)


@every_kernel
def test_finite_differences(backend, kernel):
    """The definition's gradient comes from autograd. Finite differences are independent of it."""
    x, y = embeddings(6, 4, dtype=torch.float64), embeddings(6, 3, dtype=torch.float64, requires_grad=False)
    step = 1e-6 * torch.randn(6, 4, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return kdkernels.correlation_congruence_loss(x, y, kernel=kernel, normalize=False, gamma=0.9, backend=backend)

    (gradient,) = torch.autograd.grad(loss(x), x)
    with torch.no_grad():
        change = (loss(x + step) - loss(x - step)) / 2
    assert abs(change - (gradient * step).sum()) < 1e-6 * change.abs()


@pytest.mark.parametrize("normalize", [True, False], ids=["unit rows", "raw rows"])
@every_kernel
def test_zero_and_duplicate_rows(backend, kernel, normalize):
    x, y = embeddings(8, 5, requires_grad=False), embeddings(8, 7, requires_grad=False)
    x[1] = x[4] = x[5]
    y[2] = y[5]
    if kernel != "mmd" or normalize:
        x[6] = y[0] = 0
    student, teacher = x.requires_grad_(), y.requires_grad_()
    loss, gradients = loss_and_gradients(
        lambda s, t: kdkernels.correlation_congruence_loss(s, t, kernel=kernel, normalize=normalize, backend=backend),
        student,
        teacher,
    )
    expected, exact = loss_and_gradients(
        lambda s, t: definition(s, t, kernel=kernel, normalize=normalize), *exactly(student, teacher)
    )
    assert_close(loss, expected)
    if normalize:
        assert not gradients[0][6].any()
        assert not gradients[1][0].any()
        exact[0][6] = exact[1][0] = 0  # in the definition, a zero row has a gradient
    for gradient, correct in zip(gradients, exact, strict=True):
        assert_close(gradient, correct)


@every_kernel
def test_rows_too_small_for_a_direction_count_as_zero(backend, kernel):
    x, y = embeddings(8, 5), embeddings(8, 7)
    results = []
    for size in (0, 1e-13):
        with torch.no_grad():
            x[6] = y[0] = size
        results.append(
            loss_and_gradients(
                lambda s, t: kdkernels.correlation_congruence_loss(s, t, kernel=kernel, backend=backend), x, y
            )
        )
    (zero, of_zero), (tiny, of_tiny) = results
    assert torch.equal(zero, tiny)
    assert all(map(torch.equal, of_zero, of_tiny))


@every_kernel
def test_only_the_directions_of_normalised_rows_count(backend, kernel):
    x, y, sizes = embeddings(8, 5), embeddings(8, 7), 2.0 ** torch.randint(-34, 60, (8, 1))
    larger = (sizes * x).detach().requires_grad_()
    (loss, of_x), (again, of_larger) = (
        loss_and_gradients(
            lambda s: kdkernels.correlation_congruence_loss(s, y.detach(), kernel=kernel, backend=backend), rows
        )
        for rows in (x, larger)
    )
    assert_close(again, loss)
    assert_close(sizes * of_larger[0], of_x[0])


def test_rbf_of_coincident_points(backend):
    """Far from the origin, squares are much larger than the distances. Coincident points have no gradient to each
    other.
    """
    centre = torch.full((1, 8), 64.0)
    x = (centre + torch.randint(-1, 2, (10, 8))).requires_grad_()  # exact numbers in float32
    check(backend, x, embeddings(10, 4), kernel="rbf", normalize=False, gamma=0.1)
    together = centre.repeat(10, 1).requires_grad_()
    loss = kdkernels.correlation_congruence_loss(
        together, embeddings(10, 4), kernel="rbf", normalize=False, backend=backend
    )
    loss.backward()
    assert not together.grad.any()


def test_mmd_of_ties_has_a_subgradient(backend):
    x = torch.tensor([[1.0, 3.0], [2.0, 2.0], [4.0, 0.0]], requires_grad=True)
    loss = kdkernels.correlation_congruence_loss(x, embeddings(3, 5), kernel="mmd", normalize=False, backend=backend)
    loss.backward()
    assert not x.grad.any()


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@every_kernel
def test_huge_half_precision_norms(backend, kernel, dtype):
    """Norms are computed in float32 or better, so no square overflows."""
    largest = torch.finfo(dtype).max / 4
    x = (embeddings(9, 6, requires_grad=False) * largest).to(dtype).requires_grad_()
    assert x.isfinite().all()
    loss = kdkernels.correlation_congruence_loss(x, embeddings(9, 4), kernel=kernel, backend=backend)
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()


def test_raw_rows_of_any_norm_that_float32_holds(backend):
    """Outside the range of the expansion, the polynomial is still computed."""
    check(backend, (1e3 * embeddings(9, 6).detach()).requires_grad_(), embeddings(9, 4), normalize=False)


def test_module_and_backend_block(backend):
    student, teacher = embeddings(4, 8), embeddings(4, 8)
    with kdkernels.use_backend(backend):
        loss = kdkernels.nn.CorrelationCongruenceLoss(kernel="rbf", gamma=0.9)(student, teacher)
    assert_close(loss, definition(*exactly(student, teacher), kernel="rbf", gamma=0.9).detach())


def test_the_public_implementation_is_another_number():
    """torchdistill computes the Frobenius norm over n², not squared, of rows without normalisation, in a loop."""
    student, teacher = embeddings(12, 6).detach(), embeddings(12, 6).detach()
    rows = [
        [sum((0.8**p) / math.factorial(p) * math.exp(-0.8) * (z @ z[i]) ** p for p in range(3)) for i in range(12)]
        for z in (student.double(), teacher.double())
    ]
    frobenius = (torch.stack(rows[0]) - torch.stack(rows[1])).norm() / 12**2
    loss = kdkernels.correlation_congruence_loss(student, teacher, normalize=False, reduction="sum")
    assert_close(loss.sqrt() / 12**2, frobenius)


# The kernel matrix ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False], ids=["unit rows", "raw rows"])
@every_kernel
def test_kernel_matrix(kernel, normalize):
    x, y = embeddings(5, 6), embeddings(4, 6)
    for others in (y, None):
        matrix = kdkernels.kernel_matrix(x, others, kernel=kernel, normalize=normalize, order=3, gamma=0.8)
        rows = [
            [unit(row.double()) if normalize else row.double() for row in z] for z in (x, x if others is None else y)
        ]
        expected = torch.stack([torch.stack([correlation(a, b, kernel, 0.8, 3) for b in rows[1]]) for a in rows[0]])
        assert_close(matrix, expected)
        (gradient,) = torch.autograd.grad(matrix.square().sum(), x)
        (correct,) = torch.autograd.grad(expected.square().sum(), x)
        assert_close(gradient, correct.double())


# Misuse ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "teacher", "settings", "error", "message"),
    [
        ([1.0], torch.ones(2, 3), {}, TypeError, "student must be a tensor, got list"),
        (torch.ones(2, 3), torch.ones(2, 3).int(), {}, TypeError, "teacher must be float32.*got torch.int32"),
        (
            torch.ones(2, 3, 4, 4),
            torch.ones(2, 3),
            {},
            ValueError,
            r"student must have shape n x d_S \(flatten.*4, 4\)",
        ),
        (torch.ones(0, 3), torch.ones(0, 3), {}, ValueError, r"student must not be empty, got shape \(0, 3\)"),
        (torch.ones(2, 3), torch.ones(4, 3), {}, ValueError, "teacher must have student's batch size 2, got 4"),
        (torch.ones(2, 3), torch.ones(2, 3, device="meta"), {}, ValueError, "device cpu, got meta"),
        (torch.ones(2, 3), torch.ones(2, 3), {"gamma": 0}, ValueError, "gamma must be a positive number, got 0"),
        (torch.ones(2, 3), torch.ones(2, 3), {"gamma": -0.4}, ValueError, "gamma must be a positive number, got -0.4"),
        (torch.ones(2, 3), torch.ones(2, 3), {"order": -1}, ValueError, "order must be an integer >= 0, got -1"),
        (torch.ones(2, 3), torch.ones(2, 3), {"order": 2.0}, ValueError, "order must be an integer >= 0, got 2.0"),
        (torch.ones(2, 3), torch.ones(2, 3), {"kernel": "cosine"}, ValueError, "kernel must be one of.*got 'cosine'"),
        (torch.ones(2, 3), torch.ones(2, 3), {"form": "feature"}, ValueError, "form='feature' needs kernel='bilinear'"),
        (torch.ones(2, 3), torch.ones(2, 3), {"reduction": "none"}, ValueError, "reduction must be one of"),
        (torch.ones(2, 3), torch.ones(2, 3), {"backend": "cuda"}, ValueError, "backend must be one of.*got 'cuda'"),
    ],
)
def test_misuse_is_explained(student, teacher, settings, error, message):
    with pytest.raises(error, match=message):
        kdkernels.correlation_congruence_loss(student, teacher, **settings)


def test_misuse_of_the_kernel_matrix_is_explained():
    with pytest.raises(ValueError, match="y must have x's width 3, got 4"):
        kdkernels.kernel_matrix(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="gamma must be a positive number"):
        kdkernels.kernel_matrix(torch.ones(2, 3), gamma=-1)


def test_explanation(backend):
    """It names the backend and the cheaper form. Wrong arguments raise the same errors as the call."""
    wide, narrow = (embeddings(20, width) for width in (400, 3))
    for student, settings, expected in (
        (wide, {"kernel": "bilinear"}, "gram"),
        (narrow, {"kernel": "bilinear"}, "feature"),
        (narrow, {}, "gram"),
    ):
        explanation = kdkernels.explain("correlation_congruence_loss", student, student, backend=backend, **settings)
        assert explanation.backend == backend
        ((part,),) = explanation.stages
        assert str(part.form) == expected
        assert part.costs[part.form] == min(part.costs.values())
    with pytest.raises(ValueError, match="batch size 20, got 2"):
        kdkernels.explain("correlation_congruence_loss", wide, narrow[:2])
