"""Similarity-preserving distillation (SP): Gram matrices of two networks' samples, their rows normalised, compared."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends, checks, native
from ..autograd import scaled, times
from ..congruence.plan import FEATURE, FORMS, GRAM, Form, known, similarity_costs
from ..gram import in_memory_order
from . import reference

REDUCTIONS = ("mean", "sum")


def similarity_preserving(
    student: Tensor, teacher: Tensor, *, reduction: str, form: str = "auto", backend: str = "auto"
) -> Tensor:
    """The difference of two networks' similarities; see ``kdkernels.similarity_preserving_loss``."""
    check(student, teacher, reduction, form)
    scale = 1.0 / student.shape[0] ** 2 if reduction == "mean" else 1.0
    run = {"reference": _reference, "native": _native, "triton": _triton}[choose_backend(backend, student)]
    form = choose_form(student, teacher, form)
    return times(scale, lambda scale: run(student, teacher, scale, form))


def choose_backend(backend: str, student: Tensor) -> str:
    return backends.choose(backend, student, native_on=("cpu",))


def choose_form(student: Tensor, teacher: Tensor, form: str) -> Form:
    """The cheaper form by the cost model, or the one asked for by name."""
    if form != "auto":
        return GRAM if form == "gram" else FEATURE
    costs = form_costs(student, teacher)
    return FEATURE if costs[FEATURE] < costs[GRAM] else GRAM


def form_costs(student: Tensor, teacher: Tensor) -> dict[Form, int]:
    rows = known(student.shape[0])
    widths = (known(features.numel()) // rows for features in (student, teacher))
    grads = (torch.is_grad_enabled() and features.requires_grad for features in (student, teacher))
    return similarity_costs(rows, *widths, *grads)


def check(student: object, teacher: object, reduction: str, form: str) -> None:
    student, teacher = (_features(name, value) for name, value in (("student", student), ("teacher", teacher)))
    checks.same_batch("teacher", teacher, "student", student)
    checks.same_device("teacher", teacher, "student", student)
    checks.one_of("reduction", reduction, REDUCTIONS)
    checks.one_of("form", form, FORMS)


def _features(name: str, value: object) -> Tensor:
    return checks.tensor(name, value, max(value.dim(), 2) if isinstance(value, Tensor) else 2, "n x ...")


def _reference(student: Tensor, teacher: Tensor, scale: float, form: Form) -> Tensor:
    run = reference.feature_form if form == FEATURE else reference.gram_form
    # Autocast would run the products in half precision.
    with torch.autocast(student.device.type, enabled=False):
        return run(student, teacher, scale)


def _native(student: Tensor, teacher: Tensor, scale: float, form: Form) -> Tensor:
    return _run(native.ops, student, teacher, scale, form)


def _triton(student: Tensor, teacher: Tensor, scale: float, form: Form) -> Tensor:
    from . import triton  # noqa: F401  # defines the operator

    return _run(torch.ops.kdkernels_triton, in_memory_order(student), in_memory_order(teacher), scale, form)


def _run(ops, student: Tensor, teacher: Tensor, scale: float, form: Form) -> Tensor:
    if torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad):
        return _SimilarityPreserving.apply(ops, student, teacher, scale, form == FEATURE)
    return ops.similarity_preserving(student, teacher, scale, form == FEATURE, False, False)[0]


class _SimilarityPreserving(torch.autograd.Function):
    """The loss by the operator of ``ops``, the native one or Triton's.

    The forward pass computes the gradients as well: the loss is a scalar, so backward only scales them.
    """

    @staticmethod
    def forward(ctx, ops, student: Tensor, teacher: Tensor, scale: float, feature: bool) -> Tensor:
        needed = ctx.needs_input_grad[1:3]
        loss, *gradients = ops.similarity_preserving(student, teacher, scale, feature, *needed)
        ctx.save_for_backward(*gradients)
        # Not saved: only their place in the graph is asked for, so they may be overwritten.
        ctx.inputs = student, teacher
        return loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [
            scaled(grad_loss, gradient, x.dtype, *ctx.inputs) if wanted else None
            for gradient, x, wanted in zip(ctx.saved_tensors, ctx.inputs, ctx.needs_input_grad[1:3], strict=True)
        ]
        return None, *gradients, None, None
