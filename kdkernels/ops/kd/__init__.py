"""Knowledge distillation's temperature-softened KL divergence in one pass over the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends, checks, native
from ..autograd import scaled
from . import reference


def kd(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float, scale: bool, backend: str = "auto"
) -> Tensor:
    """Batch mean of KL(softmax(teacher / T) ‖ softmax(student / T)), times T² if asked; see ``kdkernels.kd_loss``."""
    check(student_logits, teacher_logits, temperature)
    run = {"reference": reference.kd, "native": _native, "triton": _triton}[backends.choose(backend, student_logits)]
    return run(student_logits, teacher_logits, float(temperature), float(temperature) ** 2 if scale else 1.0)


def check(student: object, teacher: object, temperature: float) -> None:
    checks.logits(student, teacher)
    checks.positive("temperature", temperature)


def _native(student: Tensor, teacher: Tensor, temperature: float, scale: float) -> Tensor:
    if torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad):
        return _Native.apply(student, teacher, temperature, scale)
    return native.ops.kd(student, teacher, temperature, scale, False, False)[0]


def _triton(student: Tensor, teacher: Tensor, temperature: float, scale: float) -> Tensor:
    from . import triton

    return triton.kd(student, teacher, temperature, scale)


class _Native(torch.autograd.Function):
    """The forward pass computes the gradients as well: the loss is a scalar, so backward only scales them."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, temperature: float, scale: float) -> Tensor:
        loss, *gradients = native.ops.kd(student, teacher, temperature, scale, *ctx.needs_input_grad[:2])
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
        return *gradients, None, None
