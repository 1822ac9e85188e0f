"""Correlation congruence (CCKD): normalised embeddings, a kernel, and the difference of two kernel matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import checks
from ...types import FORMS, KERNELS, REDUCTIONS, Backend, FormName, Reduction
from ..autograd import multiplied
from ..congruence import problem_of
from ..congruence.plan import (
    GRAM,
    TILE_ENTRY,
    Coefficients,
    Plan,
    Problem,
    Sum,
    Target,
    explained,
    make_plans,
    multiply_adds,
    planned_when_it_runs,
    size_of,
    target_of,
)
from ..congruence.reference import feature_form
from ..operator import Operator
from ..row_masks import to_mean, zeroed
from ..shapes import accumulation_dtype
from ..tuning import LARGE_GRAM
from . import fake, reference
from .reference import Kernel

CORRELATION_CONGRUENCE = Operator(
    "correlation_congruence",
    kernels=(fake.correlation_congruence,),
    large=LARGE_GRAM,
    memory="n (3·d_S + d_T) numbers, and two strips of min(n, 512) x n or the largest d x d sum",
    over_ranks="twice all ranks' embeddings; of the bilinear kernel the d x d sums",
)


# Kernels of these names depend only on products of rows. The products of a zero row are 0 in both networks, so it adds
# nothing to the loss.
OF_PRODUCTS = ("taylor_rbf", "bilinear")


def correlation_congruence(
    student: Tensor,
    teacher: Tensor,
    *,
    kernel: Kernel,
    normalize: bool,
    reduction: Reduction,
    mask: Tensor | None = None,
    form: FormName = "auto",
    backend: Backend = "auto",
) -> Tensor:
    """The congruence of two networks' kernel matrices; see ``kdkernels.correlation_congruence_loss``."""
    check(student, teacher, kernel, reduction, form, mask)
    scale = 1.0 / student.shape[0] ** 2 if reduction == "mean" else 1.0

    def sums(chosen: str) -> list[list[Sum]]:
        return _explained(student, teacher, kernel, form, target_of(chosen, student))

    def size() -> tuple[int, int]:
        problem = _problem(student, teacher)
        return size_of(form if kernel.name == "bilinear" else "gram", problem)

    # The means of MMD are no products.
    chosen = CORRELATION_CONGRUENCE.choose(backend, student, sums, size if kernel.name != "mmd" else None)
    codes = []
    if not planned_when_it_runs(form, chosen):
        codes = make_plan(student, teacher, kernel, form, target_of(chosen, student)).codes
    left_out = mask
    if mask is not None and kernel.name in OF_PRODUCTS:
        student, teacher = zeroed(mask, (student, teacher))
        left_out = None

    def loss(factor: float) -> Tensor:
        settings = KERNELS.index(kernel.name), kernel.gamma, kernel.order, bool(normalize), factor, codes
        return CORRELATION_CONGRUENCE.loss(chosen, (student, teacher), settings, _reference, left_out)

    return to_mean(multiplied(scale, loss), mask if reduction == "mean" else None, power=2)


def _with_plan(arguments: list[Any], backend: str) -> list[Any]:
    """Return the arguments of the kernel, with the plan if it was left open."""
    student, teacher, kernel, *_, codes, grad_student, grad_teacher, tf32 = arguments
    if codes:
        return arguments
    plan = Plan(GRAM, GRAM, GRAM)
    if KERNELS[kernel] == "bilinear":
        sizes = student.shape[0], 1, student.shape[1], teacher.shape[1]
        problem = Problem(Coefficients(1.0, 0.0, 0.0, 0.0), *sizes, grad_student, grad_teacher)
        (plan,) = make_plans("auto", (problem,), target_of(backend, student))
    return [*arguments[:7], plan.codes, grad_student, grad_teacher, tf32]


fake.correlation_congruence.completed = _with_plan


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


def check(student: object, teacher: object, kernel: Kernel, reduction: str, form: str, mask: object = None) -> None:
    student = _embeddings("student", student, "n x d_S")
    teacher = _embeddings("teacher", teacher, "n x d_T")
    checks.same_batch("teacher", teacher, "student", student)
    checks.same_device("teacher", teacher, "student", student)
    checks.sample_mask(mask, "student", student)
    check_settings(kernel, reduction, form)


def check_settings(kernel: Kernel, reduction: str, form: str) -> None:
    check_kernel(kernel)
    checks.one_of("reduction", reduction, REDUCTIONS)
    checks.one_of("form", form, FORMS)
    if form == "feature" and kernel.name != "bilinear":
        raise ValueError(f"form='feature' needs kernel='bilinear', got kernel={kernel.name!r}; use form='auto'")


def check_kernel(kernel: Kernel) -> None:
    checks.one_of("kernel", kernel.name, KERNELS)
    checks.positive("gamma", kernel.gamma)
    checks.non_negative_int("order", kernel.order)


def _embeddings(name: str, value: object, shape: str) -> Tensor:
    if isinstance(value, Tensor) and value.dim() > 2:
        shape += " (flatten or pool feature maps first)"
    return checks.tensor(name, value, 2, shape)


def make_plan(student: Tensor, teacher: Tensor, kernel: Kernel, form: FormName, target: Target) -> Plan:
    """The forms of the sum over all pairs: the bilinear kernel has a choice."""
    if kernel.name != "bilinear":
        return Plan(GRAM, GRAM, GRAM)
    return make_plans(form, (_problem(student, teacher),), target)[0]


def _problem(student: Tensor, teacher: Tensor) -> Problem:
    return problem_of(student, teacher, 1, Coefficients(1.0, 0.0, 0.0, 0.0))


def _explained(student: Tensor, teacher: Tensor, kernel: Kernel, form: FormName, target: Target) -> list[list[Sum]]:
    problem, plan = _problem(student, teacher), make_plan(student, teacher, kernel, form, target)
    if kernel.name == "bilinear":
        return [explained(plan, problem, target)]
    rows = problem.rows
    cost = TILE_ENTRY * rows**2 if kernel.name == "mmd" else multiply_adds(GRAM, rows, *problem[3:])
    return [[Sum("all pairs", rows, 1, GRAM, {GRAM: cost})]]


def _reference(
    student: Tensor,
    teacher: Tensor,
    kernel: int,
    gamma: float,
    order: int,
    normalize: bool,
    scale: float,
    plan: list[int],
    mask: Tensor | None = None,
) -> Tensor:
    if plan[0] != GRAM.code:
        dtype = accumulation_dtype(student, teacher)
        x, y = (reference.rows_of(rows, dtype, normalize) for rows in (student, teacher))
        return feature_form(x, y, 1, Coefficients(scale, 0.0, 0.0, 0.0))
    metric = Kernel(KERNELS[kernel], gamma, order)
    return reference.correlation_congruence(student, teacher, metric, normalize, scale, mask)
