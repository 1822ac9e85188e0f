"""Weighted mean squared errors of all pairs of a student layer and a teacher layer, also for maps of
different sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ... import checks
from ...types import REDUCTIONS, Backend, Reduction
from ..autograd import multiplied
from ..operator import Operator
from ..row_masks import to_mean, zeroed
from . import fake, reference

FEATURE_MSE = Operator(
    "feature_mse",
    kernels=(fake.feature_mse, fake.feature_mse_backward),
    memory="the gradients, and per thread two maps of one sample",
    over_ranks="one number",
)


def feature_mse(
    projected: Sequence[Sequence[Tensor]],
    targets: Sequence[Sequence[Tensor]],
    weights: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """Weighted sum of every pair's per-sample errors; see ``kdkernels.cross_layer_mse``."""
    own, theirs = check(projected, targets, weights, reduction, mask)
    scale = 1.0 if reduction == "sum" else 1.0 / (weights.shape[0] * weights.shape[1])
    tensors: Sequence[Tensor] = (weights, *own, *theirs)
    if mask is not None:
        tensors = zeroed(mask, tensors)
    chosen = FEATURE_MSE.choose(backend, own[0])
    rules = _errors, _gradients
    loss = multiplied(scale, lambda factor: FEATURE_MSE.result(chosen, tensors, (factor,), _reference, rules))
    return to_mean(loss, mask if reduction == "mean" else None)


def check(
    projected: object, targets: object, weights: object, reduction: str, mask: object = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Check every argument; the maps of all pairs in the order of the weights."""
    check_settings(reduction)
    weights = checks.tensor("weights", weights, 3, "b x s_L x t_L")
    checks.sample_mask(mask, "weights", weights)
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


def check_settings(reduction: str) -> None:
    checks.one_of("reduction", reduction, REDUCTIONS)


def _pairs(name: str, value: object, students: int, teachers: int) -> list[Tensor]:
    """Return the s_L x t_L entries of a nested sequence, row by row."""
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


def _reference(weights: Tensor, *maps_and_scale: Any) -> Tensor:
    *maps, scale = maps_and_scale
    pairs = len(maps) // 2
    return reference.feature_mse(maps[:pairs], maps[pairs:], weights, scale)


def _errors(
    constants: tuple[str, float], tensors: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[tuple[Tensor], Sequence[Tensor], tuple[str, float]]:
    """Return the loss. Saved are the maps, which costs nothing, unlike gradients of all of them."""
    backend, scale = constants
    weights, *maps = tensors
    pairs = len(maps) // 2
    loss, errors = fake.feature_mse.registered(backend)(maps[:pairs], maps[pairs:], weights, scale)
    return (loss,), (errors, *tensors), constants


def _gradients(
    grad: Tensor, saved: Sequence[Tensor], constants: tuple[str, float], wanted: Sequence[bool]
) -> list[Tensor | None]:
    backend, scale = constants
    errors, weights, *maps = saved
    pairs = len(maps) // 2
    flags = [int(want) for want in wanted[1:]]
    backward = fake.feature_mse_backward.registered(backend)
    grads = backward(grad, maps[:pairs], maps[pairs:], weights, scale, flags)
    return [grad * errors if wanted[0] else None, *grads]
