"""Relational knowledge distillation: distances and angles within a batch, without a b x b x d or b x b x b tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends, checks, native
from ..autograd import scaled
from . import reference

NO_TRITON = "there is no Triton kernel for rkd"


def rkd(
    student: Tensor, teacher: Tensor, *, distance_weight: float, angle_weight: float, backend: str = "auto"
) -> Tensor:
    """Weighted distance and angle terms; see ``kdkernels.relational_kd_loss``."""
    check(student, teacher, distance_weight, angle_weight)
    run = {"reference": _reference, "native": _native}[choose_backend(backend, student)]
    return run(student, teacher, float(distance_weight), float(angle_weight))


def choose_backend(backend: str, student: Tensor) -> str:
    """Never "triton": the reference holds no large tensor either, and is what a GPU runs."""
    chosen = backends.choose(backend, student, native_on=("cpu",))
    if chosen != "triton":
        return chosen
    if backend == "triton":
        raise RuntimeError(f"backend='triton' cannot run here: {NO_TRITON}")
    return "reference"


def check(student: object, teacher: object, distance_weight: float, angle_weight: float) -> None:
    checks.embeddings(student, teacher)
    checks.non_negative("distance_weight", distance_weight)
    checks.non_negative("angle_weight", angle_weight)


def _reference(student: Tensor, teacher: Tensor, distance_weight: float, angle_weight: float) -> Tensor:
    with torch.autocast(student.device.type, enabled=False):
        return reference.rkd(student, teacher, distance_weight, angle_weight)


def _native(student: Tensor, teacher: Tensor, distance_weight: float, angle_weight: float) -> Tensor:
    if torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad):
        return _Native.apply(student, teacher, distance_weight, angle_weight)
    return native.ops.rkd(student, teacher, distance_weight, angle_weight, False, False)[0]


class _Native(torch.autograd.Function):
    """The forward pass computes the gradients as well: the loss is a scalar, so backward only scales them."""

    @staticmethod
    def forward(ctx, student, teacher, distance_weight, angle_weight):
        loss, *gradients = native.ops.rkd(student, teacher, distance_weight, angle_weight, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(*gradients)
        ctx.inputs = student, teacher
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        gradients = [
            scaled(grad_loss, gradient, x.dtype, *ctx.inputs) if wanted else None
            for gradient, x, wanted in zip(ctx.saved_tensors, ctx.inputs, ctx.needs_input_grad, strict=False)
        ]
        return *gradients, None, None
