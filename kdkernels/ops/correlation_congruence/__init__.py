"""Correlation congruence (CCKD): embeddings normalised, compared by a kernel, and the two kernel matrices compared."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends, checks, native
from ...native import accumulation_dtype
from ..autograd import scaled, times
from ..congruence import plan_for
from ..congruence.plan import FORMS, GRAM, Coefficients, Plan
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
    run = {"reference": _reference, "native": _native, "triton": _triton}[backends.choose(backend, student)]
    plan = make_plan(student, teacher, kernel, form)
    return times(scale, lambda scale: run(student, teacher, kernel, bool(normalize), scale, plan))


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


def make_plan(student: Tensor, teacher: Tensor, kernel: Kernel, form: str) -> Plan:
    """The forms of the sum over all pairs: the bilinear kernel has a choice."""
    if kernel.name != "bilinear":
        return Plan(GRAM, GRAM, GRAM)
    return plan_for(student, teacher, 1, Coefficients(1.0, 0.0, 0.0, 0.0), form)


def _reference(student: Tensor, teacher: Tensor, kernel: Kernel, normalize: bool, scale: float, plan: Plan) -> Tensor:
    # Autocast would run the products in half precision.
    with torch.autocast(student.device.type, enabled=False):
        if plan.full != GRAM:
            dtype = accumulation_dtype(student, teacher)
            x, y = (reference.rows_of(rows, dtype, normalize) for rows in (student, teacher))
            return feature_form(x, y, 1, Coefficients(scale, 0.0, 0.0, 0.0))
        return reference.correlation_congruence(student, teacher, kernel, normalize, scale)


def _native(student: Tensor, teacher: Tensor, kernel: Kernel, normalize: bool, scale: float, plan: Plan) -> Tensor:
    settings = (KERNELS.index(kernel.name), float(kernel.gamma), kernel.order, normalize, scale, plan.codes)
    if torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad):
        return _Native.apply(student, teacher, *settings)
    return native.ops.correlation_congruence(student, teacher, *settings, False, False, native.allows_tf32())[0]


def _triton(student: Tensor, teacher: Tensor, kernel: Kernel, normalize: bool, scale: float, plan: Plan) -> Tensor:
    from .triton import correlation_congruence as run

    return run(student, teacher, kernel, normalize, scale, plan)


class _Native(torch.autograd.Function):
    """The forward pass computes the gradients as well: the loss is a scalar, so backward only scales them."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, *settings) -> Tensor:
        needed = ctx.needs_input_grad[:2]
        settings = *settings, *needed, native.allows_tf32()
        loss, *gradients = native.ops.correlation_congruence(student, teacher, *settings)
        ctx.save_for_backward(*gradients)
        # Not saved: only their place in the graph is asked for, so they may be overwritten.
        ctx.inputs = student, teacher
        return loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [
            scaled(grad_loss, gradient, x.dtype, *ctx.inputs) if wanted else None
            for gradient, x, wanted in zip(ctx.saved_tensors, ctx.inputs, ctx.needs_input_grad, strict=False)
        ]
        return *gradients, None, None, None, None, None, None
