"""Inter-class correlation: row softmax of z zᵀ averaged over samples, and the divergence of two such maps."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends, checks, native
from ..autograd import once, scaled
from . import reference

REDUCTIONS = ("mean", "sum")


def icc_map(logits: Tensor, *, backend: str = "auto") -> Tensor:
    """The K x K map of b x K logits; see ``kdkernels.inter_class_correlation``."""
    check_map(logits)
    run = {"reference": _reference_map, "native": _native_map, "triton": _triton_map}
    return run[backends.choose(backend, logits)](logits)


def icc_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, per_sample: bool, reduction: str, backend: str = "auto"
) -> Tensor:
    """KL between two networks' maps; see ``kdkernels.inter_class_correlation_loss``."""
    check(student_logits, teacher_logits, reduction)
    run = {"reference": _reference_loss, "native": _native_loss, "triton": _triton_loss}
    scale = 1.0 if reduction == "sum" else 1.0 / student_logits.shape[1]
    return run[backends.choose(backend, student_logits)](student_logits, teacher_logits, bool(per_sample), scale)


def check_map(logits: object) -> None:
    checks.tensor("logits", logits, 2, "b x K")


def check(student: object, teacher: object, reduction: str) -> None:
    checks.logits(student, teacher)
    checks.one_of("reduction", reduction, REDUCTIONS)


# Autocast would change the precision of the sums.
def _reference_map(logits: Tensor) -> Tensor:
    with torch.autocast(logits.device.type, enabled=False):
        return reference.icc_map(logits)


def _reference_loss(student: Tensor, teacher: Tensor, per_sample: bool, scale: float) -> Tensor:
    with torch.autocast(student.device.type, enabled=False):
        return reference.icc_loss(student, teacher, per_sample, scale)


def _triton_map(logits: Tensor) -> Tensor:
    from . import triton

    return triton.icc_map(logits)


def _triton_loss(student: Tensor, teacher: Tensor, per_sample: bool, scale: float) -> Tensor:
    from . import triton

    return triton.icc_loss(student, teacher, per_sample, scale)


def _native_map(logits: Tensor) -> Tensor:
    if torch.is_grad_enabled() and logits.requires_grad:
        return Map.apply(logits, native.ops)
    return native.ops.icc_map(logits)


def _native_loss(student: Tensor, teacher: Tensor, per_sample: bool, scale: float) -> Tensor:
    if torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad):
        return Loss.apply(student, teacher, per_sample, scale, native.ops)
    return native.ops.icc_loss(student, teacher, per_sample, scale, False, False)[0]


class Map(torch.autograd.Function):
    """``ops``: whose operators compute it, those of the native library or of Triton."""

    @staticmethod
    def forward(ctx, logits: Tensor, ops) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.ops = ops
        return ops.icc_map(logits)

    @staticmethod
    def backward(ctx, grad_map: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        with torch.no_grad():
            gradient = ctx.ops.icc_map_backward(grad_map, logits).to(logits.dtype)
        return once(gradient, logits), None


class Loss(torch.autograd.Function):
    """The forward pass computes the gradients as well: the loss is a scalar, so backward only scales them."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, per_sample: bool, scale: float, ops) -> Tensor:
        loss, *gradients = ops.icc_loss(student, teacher, per_sample, scale, *ctx.needs_input_grad[:2])
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
        return *gradients, None, None, None
