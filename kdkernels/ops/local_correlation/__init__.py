"""Local correlation consistency (LKD): ``patches`` and ``congruence`` composed over the stages of two networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import backends, checks, native
from ..autograd import once
from ..congruence.plan import FORMS, Coefficients, Plan, Problem, known, make_plans
from ..congruence.reference import feature_form
from ..patches import check as check_features
from ..patches import check_mask, patches
from . import reference

REDUCTIONS = ("sum", "mean")


class Stage(NamedTuple):
    """One stage of both networks, checked."""

    student: Tensor
    teacher: Tensor
    mask: Tensor | None
    k: int
    weights: tuple[float, float, float]
    reduction: str

    @property
    def coefficients(self) -> Coefficients:
        return self.coefficients_for(self.student.shape[0])

    @property
    def lengths(self) -> tuple[int, int]:
        """Components of a patch vector of the student and of the teacher."""
        student, teacher = (c * -(-h // self.k) * -(-w // self.k) for _, c, h, w in (f.shape for f in self[:2]))
        return student, teacher

    @property
    def wanted(self) -> tuple[bool, bool]:
        """Whether the student and the teacher get a gradient."""
        learning = torch.is_grad_enabled()
        return learning and self.student.requires_grad, learning and self.teacher.requires_grad

    @property
    def problem(self) -> Problem:
        images, positions = known(self.student.shape[0]), self.k**2
        sizes = images * positions, positions, *map(known, self.lengths)
        return Problem(self.coefficients_for(images), *sizes, *self.wanted)

    def coefficients_for(self, images: int) -> Coefficients:
        """w₁·intra + w₂·inter_same + w₃·inter_diff as sums over all pairs and corrections to them.

        csrc/relations.h does the same, so that operators need no numbers that depend on the batch.
        """
        positions = self.k**2
        intra, same, diff = self.weights
        if self.reduction == "mean":
            counts = reference.pairs(images, positions)
            intra, same, diff = (weight / max(count, 1) for weight, count in zip(self.weights, counts, strict=True))
        if positions == 1:
            return Coefficients(same, 0.0, 0.0, intra)
        if images == 1:
            return Coefficients(intra, 0.0, 0.0, same)
        return Coefficients(diff, intra - diff, same - diff, diff)


class Settings(NamedTuple):
    threshold: float | None
    partition: str
    eps: float
    form: str


def local_correlation_loss(stages: Sequence[Stage], settings: Settings, backend: str) -> Tensor:
    """The loss summed over the stages; see ``kdkernels.local_correlation_loss``."""
    run = {"reference": _reference, "native": _native, "triton": _triton}[backends.choose(backend, stages[0].student)]
    return run(stages, settings)


def _reference(stages: Sequence[Stage], settings: Settings) -> Tensor:
    # Autocast would run the products in half precision.
    with torch.autocast(stages[0].student.device.type, enabled=False):
        return torch.stack([_reference_stage(stage, settings) for stage in stages]).sum()


def _reference_stage(stage: Stage, settings: Settings) -> Tensor:
    student, teacher = (patches_of(stage, features, settings, "reference") for features in stage[:2])
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    student, teacher = student.to(dtype), teacher.to(dtype)
    if settings.form == "feature":
        return feature_form(student, teacher, stage.k**2, stage.coefficients)
    return reference.local_correlation_loss(student, teacher, stage.k**2, stage.weights, stage.reduction == "mean")


def _triton(stages: Sequence[Stage], settings: Settings) -> Tensor:
    plans = plans_of(stages, settings.form, "triton")
    return torch.stack([_triton_stage(*one, settings) for one in zip(stages, plans, strict=True)]).sum()


def _triton_stage(stage: Stage, plan: Plan, settings: Settings) -> Tensor:
    from ..congruence.triton import congruence

    student, teacher = (patches_of(stage, features, settings, "triton") for features in stage[:2])
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    return congruence(student.to(dtype), teacher.to(dtype), stage.k**2, stage.coefficients, plan)


def _native(stages: Sequence[Stage], settings: Settings) -> Tensor:
    features = [stage.student for stage in stages] + [stage.teacher for stage in stages]
    arguments = (
        [stage.mask for stage in stages if stage.mask is not None],
        [stage.k for stage in stages],
        stages[0].weights,
        stages[0].reduction == "mean",
        [code for plan in plans_of(stages, settings.form, "native") for code in plan.codes],
        settings.threshold,
        settings.partition == "resize",
        settings.eps,
    )
    if torch.is_grad_enabled() and any(f.requires_grad for f in features):
        return _Native.apply(arguments, *features)
    return _call(arguments, features, [0] * len(features))[0]


def _call(arguments: tuple, features: Sequence[Tensor], wanted: list[int]) -> tuple[Tensor, list[Tensor]]:
    stages = len(features) // 2
    settings = *arguments, wanted, native.allows_tf32()
    return native.ops.local_correlation(features[:stages], features[stages:], *settings)


class _Native(torch.autograd.Function):
    """Every stage of both networks in one call. What is saved are the gradients of the patches, yet to be scaled."""

    @staticmethod
    def forward(ctx, arguments, *features):
        loss, grads = _call(arguments, features, [int(want) for want in ctx.needs_input_grad[1:]])
        masks, k, _, _, _, threshold, resize, _ = arguments
        ctx.save_for_backward(loss, *grads, *masks)  # the loss: by it the graph goes on, see FirstDerivative
        ctx.settings = [number for f in features for number in native.map_shape(f)], k, threshold, resize
        ctx.dtypes = [f.dtype for f in features]
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        if not torch.is_grad_enabled():  # as in every backward pass that does not ask for a graph
            return None, *_Native._gradients(ctx, grad_loss, ctx.saved_tensors)
        with torch.no_grad():
            grads = _Native._gradients(ctx, grad_loss, ctx.saved_tensors)
        return None, *(None if grad is None else once(grad, ctx.saved_tensors[0]) for grad in grads)

    @staticmethod
    def _gradients(ctx, grad_loss, saved):
        count = len(ctx.dtypes)
        shapes, k, threshold, resize = ctx.settings
        rows, masks = saved[1 : count + 1], saved[count + 1 :]
        grads = native.ops.local_correlation_backward(grad_loss, rows, shapes, masks, k, threshold, resize)
        wanted = zip(grads, ctx.dtypes, ctx.needs_input_grad[1:], strict=True)
        return [grad.to(dtype) if want else None for grad, dtype, want in wanted]


def plans_of(stages: Sequence[Stage], form: str, backend: str) -> tuple[Plan, ...]:
    """The forms of every stage's sums. The native operator computes all stages together."""
    launched = backend == "native" and native.launches(stages[0].student)
    return make_plans(form, tuple(stage.problem for stage in stages), launched=launched)


def patches_of(stage: Stage, features: Tensor, settings: Settings, backend: str) -> Tensor:
    return patches(
        features,
        stage.k,
        mask=stage.mask,
        threshold=settings.threshold,
        partition=settings.partition,
        eps=settings.eps,
        backend=backend,
    )


def check(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    k: int | Sequence[int],
    weights: Sequence[float],
    mask: Tensor | Sequence[Tensor] | None,
    reduction: str,
    settings: Settings,
) -> list[Stage]:
    """Check every argument and gather them by stage."""
    checks.one_of("reduction", reduction, REDUCTIONS)
    checks.one_of("form", settings.form, FORMS)
    checks.non_negative("eps", settings.eps)
    weights = _check_weights(weights)
    students = _per_stage("student", student, None)
    count = len(students)
    teachers = _per_stage("teacher", teacher, count)
    masks = [None] * count if mask is None else _per_stage("mask", mask, count)
    if mask is not None and any(m is None for m in masks):
        raise TypeError("mask must hold a tensor for every stage, got None for one")
    ks = _per_stage("k", k, count) if isinstance(k, Sequence) and not isinstance(k, str) else [k] * count
    return [
        _check_stage(f"[{i}]" if count > 1 else "", s, t, m, side, weights, reduction, settings)
        for i, (s, t, m, side) in enumerate(zip(students, teachers, masks, ks, strict=True))
    ]


def _check_stage(
    index: str,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    k: int,
    weights: tuple[float, float, float],
    reduction: str,
    settings: Settings,
) -> Stage:
    check_features(f"student{index}", student, k, settings.partition)
    check_features(f"teacher{index}", teacher, k, settings.partition)
    checks.same_batch(f"teacher{index}", teacher, f"student{index}", student)
    checks.same_device(f"teacher{index}", teacher, f"student{index}", student)
    mask = check_mask(f"mask{index}", mask, settings.threshold, f"teacher{index}", teacher)
    if mask is not None and mask.shape[-2:] != teacher.shape[-2:]:
        raise ValueError(
            f"mask{index} must have teacher{index}'s height and width {tuple(teacher.shape[-2:])}, "
            f"got {tuple(mask.shape[-2:])}"
        )
    return Stage(student, teacher, mask, k, weights, reduction)


def _check_weights(weights: Sequence[float]) -> tuple[float, float, float]:
    try:
        intra, same, diff = map(float, weights)
        finite = all(-math.inf < weight < math.inf for weight in (intra, same, diff))
    except (TypeError, ValueError):
        finite = False
    if not finite:
        raise ValueError(f"weights must be three finite numbers (intra, inter_same, inter_diff), got {weights!r}")
    return intra, same, diff


def _per_stage(name: str, value: object, count: int | None) -> list:
    if isinstance(value, Tensor):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name} must be a tensor or a sequence of them, one per stage, got {type(value).__name__}")
    if len(value) == 0:
        raise ValueError(f"{name} must hold at least one stage, got an empty sequence")
    if count is not None and len(value) != count:
        raise ValueError(f"{name} must hold one entry per stage of student, {count}, got {len(value)}")
    return list(value)
