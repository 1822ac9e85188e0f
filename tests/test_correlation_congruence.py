"""CCKD's loss and its kernels against definitions in float64, pair by pair, and the contracts."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, HALF_DTYPES, assert_close, assert_matches, exactly, loss_and_gradients
from torch import Tensor, library

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
    """Of unit vectors, which is what the expansion is of (Eq. 9)."""
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_kernel
def test_dtypes(backend, kernel, dtype):
    check(backend, embeddings(13, 9, dtype=dtype), embeddings(13, 6, dtype=dtype), kernel=kernel)
    if dtype not in HALF_DTYPES:
        check(backend, embeddings(13, 9, dtype=dtype), embeddings(13, 6, dtype=dtype), kernel=kernel, normalize=False)


@pytest.mark.parametrize("student", DTYPES, ids=str)
@pytest.mark.parametrize("teacher", DTYPES, ids=str)
def test_mixed_dtypes(backend, student, teacher):
    check(backend, embeddings(9, 7, dtype=student), embeddings(9, 5, dtype=teacher))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t().contiguous().t(),
        lambda x: torch.cat([x, x], 1)[:, 3 : 3 + x.shape[1]],
        lambda x: torch.stack([x, x], 2)[:, :, 1],
        lambda x: torch.cat([x, 2 * x])[::2],
        lambda x: x.flatten()[:28].unfold(0, 21, 1),
    ],
    ids=["transposed", "sliced", "every other column", "every other row", "overlapping"],
)
@pytest.mark.parametrize("normalize", [True, False], ids=["unit rows", "raw rows"])
def test_strides(backend, view, normalize):
    student, teacher = (view(embeddings(8, 21, requires_grad=False)) for _ in range(2))
    check(backend, student.requires_grad_(), embeddings(8, 21), normalize=normalize)
    check(backend, embeddings(8, 21), teacher.requires_grad_(), normalize=normalize)


def apart(rows: Tensor, normalize: bool) -> Tensor:
    """The rows whose means are not next to equal: there the derivative of mmd's |difference of means| jumps."""
    means = (F.normalize(rows.double()) if normalize else rows.double()).mean(1)
    by_mean = means.argsort()
    near = by_mean[1:][means[by_mean].diff() < 1e-7]
    return rows[~torch.isin(torch.arange(len(rows)), near)]


@pytest.mark.parametrize("normalize", [True, False], ids=["unit rows", "raw rows"])
@pytest.mark.parametrize("rows", [65, 700, 1100])
@every_kernel
def test_many_rows(kernel, rows, normalize):
    """More than one strip, the last one short."""
    x, y = (apart(embeddings(rows + 40, width), normalize)[:rows] for width in (24, 40))
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()

    def loss_of(backend: str):
        return lambda s, t: kdkernels.correlation_congruence_loss(
            s, t, kernel=kernel, form="gram", normalize=normalize, backend=backend
        )

    assert_matches(loss_of("auto"), loss_of("reference"), x, y)


@every_kernel
def test_finite_differences(backend, kernel):
    """The definition's own gradient is autograd's; this one is nobody's."""
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
        exact[0][6] = exact[1][0] = 0  # of the definition, whose zero row may grow in any direction
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
    """Far from the origin, where squares would drown the distances; coincident points have no pull on each other."""
    centre = torch.full((1, 8), 64.0)
    x = (centre + torch.randint(-1, 2, (10, 8))).requires_grad_()  # exact in float32
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
    """Norms are taken in float32 or better: no square overflows."""
    largest = torch.finfo(dtype).max / 4
    x = (embeddings(9, 6, requires_grad=False) * largest).to(dtype).requires_grad_()
    assert x.isfinite().all()
    loss = kdkernels.correlation_congruence_loss(x, embeddings(9, 4), kernel=kernel, backend=backend)
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()


def test_raw_rows_of_any_norm_that_float32_holds(backend):
    """Outside the expansion's validity, the polynomial is computed as it stands."""
    check(backend, (1e3 * embeddings(9, 6).detach()).requires_grad_(), embeddings(9, 4), normalize=False)


@every_kernel
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("normalize", [True, False], ids=["unit rows", "raw rows"])
@pytest.mark.parametrize("n", [1, 20])
def test_not_a_number_comes_out(backend, kernel, value, normalize, n):
    for place in range(2):
        rows = [embeddings(n, 9, requires_grad=False) for _ in range(2)]
        rows[place][-1, 3] = value
        loss = kdkernels.correlation_congruence_loss(*rows, kernel=kernel, normalize=normalize, backend=backend)
        assert not loss.isfinite()


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)], ids=str)
@every_kernel
def test_gradients_where_wanted(backend, kernel, wanted):
    rows = [embeddings(9, 6, requires_grad=want) for want in wanted]
    if any(wanted):
        check(backend, *rows, kernel=kernel)
    else:
        assert not kdkernels.correlation_congruence_loss(*rows, kernel=kernel, backend=backend).requires_grad
    with torch.no_grad():
        assert not kdkernels.correlation_congruence_loss(*rows, kernel=kernel, backend=backend).requires_grad


@every_kernel
def test_upstream_gradient_and_a_second_backward(backend, kernel):
    student, teacher = embeddings(6, 15), embeddings(6, 15)
    loss = kdkernels.correlation_congruence_loss(student, teacher, kernel=kernel, backend=backend)
    (once,) = torch.autograd.grad(loss, student, retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * loss, student, retain_graph=True)
    (again,) = torch.autograd.grad(loss, student)
    assert_close(thrice, 3 * once)
    assert torch.equal(once, again)


@pytest.mark.parametrize("backend", ["native", "triton"], indirect=True)
def test_a_second_derivative_raises(backend):
    student = embeddings(6, 15)
    loss = kdkernels.correlation_congruence_loss(student, embeddings(6, 15), backend=backend)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (loss + gradient.square().sum()).backward()


@every_kernel
def test_repeats_bit_by_bit(backend, kernel):
    student, teacher = embeddings(130, 33), embeddings(130, 20)

    def run() -> tuple[Tensor, list[Tensor]]:
        return loss_and_gradients(
            lambda s, t: kdkernels.correlation_congruence_loss(s, t, kernel=kernel, backend=backend), student, teacher
        )

    first, second = run(), run()
    assert torch.equal(first[0], second[0])
    assert all(map(torch.equal, first[1], second[1]))


@every_kernel
def test_autocast_changes_nothing(backend, kernel):
    student, teacher = embeddings(6, 15, dtype=torch.bfloat16), embeddings(6, 15)
    plain = kdkernels.correlation_congruence_loss(student, teacher, kernel=kernel, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = kdkernels.correlation_congruence_loss(student, teacher, kernel=kernel, backend=backend)
    assert mixed.dtype == torch.float32
    assert torch.equal(plain, mixed)


@needs_native
@pytest.mark.parametrize("kernel", range(4))
@pytest.mark.parametrize("wanted", [(True, False), (True, True), (False, False)], ids=str)
def test_opcheck(kernel, wanted):
    student = embeddings(5, 12, requires_grad=False)
    teacher = embeddings(7, 5, dtype=torch.bfloat16, requires_grad=False).t()
    settings = (kernel, 0.4, 2, True, 0.1, [0, 0, 0])
    library.opcheck(native.ops.correlation_congruence.default, (student, teacher, *settings, *wanted))


def test_compiles_into_one_graph(backend):
    if backend == "triton":
        pytest.skip("the interpreter cannot be compiled")

    @torch.compile(fullgraph=True)
    def step(s: Tensor, t: Tensor) -> Tensor:
        return 2 * kdkernels.correlation_congruence_loss(s, t, backend=backend)

    for shape in ((6, 15), (9, 11)):
        student, teacher = embeddings(*shape), embeddings(*shape)
        assert_matches(step, lambda s, t: 2 * definition(s, t), student, teacher)


def test_module_and_backend_block(backend):
    student, teacher = embeddings(4, 8), embeddings(4, 8)
    with kdkernels.use_backend(backend):
        loss = kdkernels.nn.CorrelationCongruenceLoss(kernel="rbf", gamma=0.9)(student, teacher)
    assert_close(loss, definition(*exactly(student, teacher), kernel="rbf", gamma=0.9).detach())


def test_the_public_implementation_is_another_number():
    """torchdistill's: the Frobenius norm over n², not squared, of rows as they are, by a loop over them."""
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
        (torch.ones(2, 3), torch.ones(2, 3), {"form": "feature"}, ValueError, "form='feature' is that of.*bilinear"),
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
    """Names the backend and the cheaper form; and misuse is explained as by the call itself."""
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
