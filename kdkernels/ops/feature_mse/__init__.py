"""Weighted mean-square errors of all pairs of a student layer and a teacher layer, maps of different sizes included."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import backends, checks, native
from ..autograd import once, scaled, times
from . import reference

REDUCTIONS = ("mean", "sum")


def feature_mse(
    projected: Sequence[Sequence[Tensor]],
    targets: Sequence[Sequence[Tensor]],
    weights: Tensor,
    *,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Weighted sum of every pair's per-sample errors; see ``kdkernels.cross_layer_mse``."""
    projected, targets = check(projected, targets, weights, reduction)
    scale = 1.0 if reduction == "sum" else 1.0 / (weights.shape[0] * weights.shape[1])
    run = {"reference": _reference, "native": _native, "triton": _triton}[backends.choose(backend, projected[0])]
    if torch.compiler.is_compiling():
        # Dynamo takes no tensor twice, and a teacher's layer is the target of every student layer.
        projected, targets = ([layer.view_as(layer) for layer in maps] for maps in (projected, targets))
    return times(scale, lambda scale: run(projected, targets, weights, scale))


def check(projected: object, targets: object, weights: object, reduction: str) -> tuple[list[Tensor], list[Tensor]]:
    """Check every argument; the maps of all pairs in the order of the weights."""
    checks.one_of("reduction", reduction, REDUCTIONS)
    weights = checks.tensor("weights", weights, 3, "b x s_L x t_L")
    _, students, teachers = weights.shape
    maps = [_pairs(name, value, students, teachers) for name, value in (("projected", projected), ("targets", targets))]
    for pair, (own, target) in enumerate(zip(*maps, strict=True)):
        index = f"[{pair // teachers}][{pair % teachers}]"
        for name, value in ((f"projected{index}", own), (f"targets{index}", target)):
            checks.tensor(name, value, 4, "b x c x h x w")
            checks.same_batch(name, value, "weights", weights)
            checks.same_device(name, value, "weights", weights)
        if own.shape[1] != target.shape[1]:
            raise ValueError(
                f"targets{index} must have projected{index}'s {own.shape[1]} channels, got {target.shape[1]}"
            )
    return maps[0], maps[1]


def _pairs(name: str, value: object, students: int, teachers: int) -> list[Tensor]:
    """The s_L x t_L entries of a nested sequence, row by row."""
    if not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence of sequences of maps, got {type(value).__name__}")
    for i, row in enumerate(value):
        if not isinstance(row, Sequence):
            raise TypeError(f"{name}[{i}] must be a sequence of maps, got {type(row).__name__}")
    lengths = [len(row) for row in value]
    if lengths != students * [teachers]:
        raise ValueError(
            f"{name} must hold weights' {students} student layers of {teachers} maps each, got lengths {lengths}"
        )
    return [maps for row in value for maps in row]


def _reference(projected: list[Tensor], targets: list[Tensor], weights: Tensor, scale: float) -> Tensor:
    # Autocast would change the precision of the sums.
    with torch.autocast(weights.device.type, enabled=False):
        return reference.feature_mse(projected, targets, weights, scale)


def _native(projected: list[Tensor], targets: list[Tensor], weights: Tensor, scale: float) -> Tensor:
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*projected, *targets, weights)):
        return FeatureMSE.apply(native.ops, scale, weights, *projected, *targets)
    return native.ops.feature_mse(projected, targets, weights, scale)[0]


def _triton(projected: list[Tensor], targets: list[Tensor], weights: Tensor, scale: float) -> Tensor:
    from .triton import feature_mse as run

    return run(projected, targets, weights, scale)


class FeatureMSE(torch.autograd.Function):
    """The maps' gradients are computed in the backward pass: saving the maps costs nothing, unlike gradients."""

    @staticmethod
    def forward(ctx, ops, scale, weights, *maps):
        pairs = len(maps) // 2
        loss, errors = ops.feature_mse(maps[:pairs], maps[pairs:], weights, scale)
        ctx.save_for_backward(errors, weights, *maps)
        ctx.ops, ctx.scale = ops, scale
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        errors, weights, *maps = ctx.saved_tensors
        _, _, want_weights, *wanted = ctx.needs_input_grad
        pairs = len(maps) // 2
        with torch.no_grad():
            grads = ctx.ops.feature_mse_backward(
                grad_loss, maps[:pairs], maps[pairs:], weights, ctx.scale, [int(want) for want in wanted]
            )
        anchored = zip(grads, maps, wanted, strict=True)
        return (
            None,
            None,
            scaled(grad_loss, errors, weights.dtype, weights, *maps) if want_weights else None,
            *(once(grad, weights, *maps) if want else None for grad, own, want in anchored),
        )
