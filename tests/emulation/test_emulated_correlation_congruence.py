"""``correlation_congruence`` in CUDA, emulated, against the reference in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import DTYPES, HALF_DTYPES, assert_matches, loss_and_gradients, relative_error
from torch import Tensor

import kdkernels

from . import build

KERNELS = ("taylor_rbf", "rbf", "bilinear", "mmd")


def embeddings(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape) / shape[1] ** 0.5).to(dtype).requires_grad_()


def check(student: Tensor, teacher: Tensor, **settings: object) -> None:
    def run(s: Tensor, t: Tensor, backend: str = "native") -> Tensor:
        return kdkernels.correlation_congruence_loss(s, t, backend=backend, **settings)

    assert_matches(run, lambda s, t: run(s, t, "reference"), student, teacher)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("rows", "student_width", "teacher_width"), [(5, 1, 3), (66, 20, 7)])
def test_kernels(order: str, kernel: str, normalize: bool, rows: int, student_width: int, teacher_width: int) -> None:
    check(embeddings(rows, student_width), embeddings(rows, teacher_width), kernel=kernel, normalize=normalize)


@pytest.mark.parametrize("order_of_series", [0, 1, 3, 7])
def test_orders(order_of_series: int) -> None:
    check(embeddings(9, 5), embeddings(9, 6), order=order_of_series, gamma=0.7, reduction="sum")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_strides(kernel: str, dtype: torch.dtype) -> None:
    student = embeddings(6, 21, dtype=dtype).detach().t().requires_grad_()
    teacher = embeddings(42, 30, dtype=dtype).detach()[::2, 3:24].requires_grad_()
    check(student, teacher, kernel=kernel)


@pytest.mark.parametrize("learning", [(True, False), (False, True)])
def test_gradients_where_wanted(learning: tuple[bool, bool]) -> None:
    student, teacher = embeddings(9, 5), embeddings(9, 6)
    check(student.requires_grad_(learning[0]), teacher.requires_grad_(learning[1]))


@pytest.mark.parametrize("kernel", ["taylor_rbf", "rbf", "bilinear"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_half_precision(order: str, kernel: str, normalize: bool, dtype: torch.dtype) -> None:
    student, teacher = embeddings(66, 20, dtype=dtype), embeddings(66, 40, dtype=dtype)
    check(student, teacher, kernel=kernel, normalize=normalize, form="gram")


@pytest.mark.parametrize(("dtype", "exponents"), [(torch.float16, 12), (torch.bfloat16, 100)])
def test_half_precision_rows_of_any_norm(dtype: torch.dtype, exponents: int) -> None:
    sizes = 2.0 ** torch.randint(-exponents, exponents, (2, 9, 1))
    sizes[0, 4] = 0
    student, teacher = ((torch.randn(9, 16) * size).to(dtype).requires_grad_() for size in sizes)
    check(student, teacher)
    with torch.no_grad():
        student[2, 3] = torch.nan
    assert kdkernels.correlation_congruence_loss(student, teacher, backend="native").isnan()


@pytest.mark.parametrize(("kernel", "dtype"), [("taylor_rbf", torch.bfloat16), ("rbf", torch.float32)])
def test_strips_of_a_large_matrix(kernel: str, dtype: torch.dtype) -> None:
    check(embeddings(1100, 4, dtype=dtype), embeddings(1100, 3, dtype=dtype).detach(), kernel=kernel)


@pytest.mark.parametrize("kernel", ["taylor_rbf", "rbf", "bilinear"])
def test_tf32_where_permitted(request: pytest.FixtureRequest, kernel: str) -> None:
    def run() -> list[Tensor]:
        settings = {"kernel": kernel, "form": "gram", "backend": "native"}
        fused = partial(kdkernels.correlation_congruence_loss, **settings)
        loss, gradients = loss_and_gradients(fused, student, teacher)
        return [loss, *gradients]

    student, teacher = embeddings(66, 20), embeddings(66, 40)
    accurate = run()
    request.getfixturevalue("permit_tf32")
    rounded = run()
    assert not torch.equal(rounded[1], accurate[1])  # losses, which are single numbers, may be equal
    for result, exact in zip(rounded, accurate, strict=True):
        assert relative_error(result, exact) < 2.0**-14


def test_rbf_far_from_the_origin() -> None:
    """Squares are much larger than the distances there."""
    student = (64 + torch.randint(-1, 2, (10, 8))).float().requires_grad_()
    check(student, embeddings(10, 4), kernel="rbf", normalize=False, gamma=0.1)


@pytest.mark.parametrize("size", [0, 1e-13])
@pytest.mark.parametrize("kernel", KERNELS)
def test_zero_and_nan_rows(kernel: str, size: float) -> None:
    """Rows with a norm of at most eps count as zero."""
    student, teacher = embeddings(9, 5).detach(), embeddings(9, 6)
    student[3], student[6] = size, student[7]
    check(student.requires_grad_(), teacher, kernel=kernel)
    student = student.detach()
    student[4, 2] = torch.nan
    assert kdkernels.correlation_congruence_loss(student, teacher, kernel=kernel, backend="native").isnan()


def test_launches() -> None:
    kdkernels.correlation_congruence_loss(embeddings(64, 8), embeddings(64, 8).detach(), backend="native")
    assert build.launches() == 4
