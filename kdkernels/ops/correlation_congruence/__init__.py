"""Correlation congruence (CCKD): embeddings normalised, compared by a kernel, and the two kernel matrices compared."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends, checks
from ...native import accumulation_dtype
from ..congruence.plan import FORMS, Coefficients
from ..congruence.reference import feature_form
from . import reference
from .reference import KERNELS, Kernel

REDUCTIONS = ("mean", "sum")


def correlation_congruence(
    student: Tensor,
    teacher: Tensor,
    *,
    kernel: Kernel,
    normalize: bool,
    reduction: str,
    form: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """The congruence of two networks' kernel matrices; see ``kdkernels.correlation_congruence_loss``."""
    check(student, teacher, kernel, reduction, form)
    scale = 1.0 / student.shape[0] ** 2 if reduction == "mean" else 1.0
    run = {"reference": _reference}[backends.choose("reference" if backend == "auto" else backend, student)]
    return run(student, teacher, kernel, bool(normalize), scale, form)


def kernel_matrix(x: Tensor, y: Tensor | None, *, kernel: Kernel, normalize: bool) -> Tensor:
    """The kernel matrix itself; see ``kdkernels.kernel_matrix``."""
    check_kernel(kernel)
    x = checks.tensor("x", x, 2, "n x d")
    if y is not None:
        checks.tensor("y", y, 2, "m x d")
        checks.same_device("y", y, "x", x)
        if y.shape[1] != x.shape[1]:
            raise ValueError(f"y must have x's width {x.shape[1]}, got {y.shape[1]}")
    with torch.autocast(x.device.type, enabled=False):
        dtype = accumulation_dtype(x) if y is None else accumulation_dtype(x, y)
        rows = reference.rows_of(x, dtype, normalize)
        others = rows if y is None else reference.rows_of(y, dtype, normalize)
        return reference.kernel_matrix(rows, others, kernel)


def check(student: object, teacher: object, kernel: Kernel, reduction: str, form: str) -> None:
    student = _embeddings("student", student, "n x d_S")
    teacher = _embeddings("teacher", teacher, "n x d_T")
    checks.same_batch("teacher", teacher, "student", student)
    checks.same_device("teacher", teacher, "student", student)
    check_kernel(kernel)
    checks.one_of("reduction", reduction, REDUCTIONS)
    checks.one_of("form", form, FORMS)
    if form == "feature" and kernel.name != "bilinear":
        raise ValueError(f"form='feature' is that of kernel='bilinear' alone, got kernel={kernel.name!r}")


def check_kernel(kernel: Kernel) -> None:
    checks.one_of("kernel", kernel.name, KERNELS)
    checks.positive("gamma", kernel.gamma)
    checks.non_negative_int("order", kernel.order)


def _embeddings(name: str, value: object, shape: str) -> Tensor:
    if isinstance(value, Tensor) and value.dim() > 2:
        shape += " (flatten or pool feature maps first)"
    return checks.tensor(name, value, 2, shape)


def _reference(student: Tensor, teacher: Tensor, kernel: Kernel, normalize: bool, scale: float, form: str) -> Tensor:
    # Autocast would run the products in half precision.
    with torch.autocast(student.device.type, enabled=False):
        if form == "feature":
            dtype = accumulation_dtype(student, teacher)
            x, y = (reference.rows_of(rows, dtype, normalize) for rows in (student, teacher))
            return feature_form(x, y, 1, Coefficients(scale, 0.0, 0.0, 0.0))
        return reference.correlation_congruence(student, teacher, kernel, normalize, scale)
