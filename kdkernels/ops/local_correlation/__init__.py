"""Local correlation consistency (LKD): ``patches`` and ``congruence`` composed over the stages of two networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import checks
from ...types import FORMS, LOCAL_REDUCTIONS, PARTITIONS, Backend, FormName, LocalReduction, Partition
from ..autograd import WithBackwardKernel, distinct, multiplied, needs_gradient
from ..congruence import congruence
from ..congruence.plan import (
    Coefficients,
    Plan,
    Problem,
    Sum,
    explained,
    known,
    make_plans,
    planned_when_it_runs,
    size_of,
    target_of,
)
from ..congruence.reference import feature_form
from ..operator import Operator, full_precision
from ..patches import PATCHES, check_mask, patches
from ..patches import check as check_features
from ..patches.reference import split_first
from ..shapes import map_shape
from ..tuning import LARGE_GRAM
from . import fake, reference

LOCAL_CORRELATION = Operator(
    "local_correlation",
    kernels=(fake.local_correlation, fake.local_correlation_backward),
    large=LARGE_GRAM,
    memory="of every stage 2·N·d_S; of one at a time N (d_S + d_T) and min(N, 512)·N or the largest d x d sum",
    over_ranks="the d x d sums of all pairs (feature form), or twice all ranks' patches (Gram form)",
)


class Stage(NamedTuple):
    """One stage of both networks, checked."""

    student: Tensor
    teacher: Tensor
    mask: Tensor | None
    k: int
    weights: tuple[float, float, float]
    reduction: LocalReduction

    @property
    def coefficients(self) -> Coefficients:
        return self.coefficients_for(self.student.shape[0])

    @property
    def lengths(self) -> tuple[int, int]:
        """Return the lengths of a patch vector of the student and of the teacher."""
        student, teacher = (c * -(-h // self.k) * -(-w // self.k) for _, c, h, w in (f.shape for f in self[:2]))
        return student, teacher

    @property
    def wanted(self) -> tuple[bool, bool]:
        """Return whether the student and the teacher get a gradient."""
        learning = torch.is_grad_enabled()
        return learning and self.student.requires_grad, learning and self.teacher.requires_grad

    @property
    def problem(self) -> Problem:
        images, positions = known(self.student.shape[0]), self.k**2
        d_student, d_teacher = map(known, self.lengths)
        rows = images * positions
        return Problem(self.coefficients_for(images), rows, positions, d_student, d_teacher, *self.wanted)

    def coefficients_for(self, images: int) -> Coefficients:
        """Return w₁·intra + w₂·inter_same + w₃·inter_diff as coefficients of the sum over all pairs and its
        corrections.

        csrc/relations.h does the same, so that operators take no numbers that depend on the batch.
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

    def split_first(self, threshold: float | None) -> Stage:
        """The stage with maps that k divides: their cells are the patches of ``partition="split"``."""
        student, teacher = (split_first(features, self.k, self.mask, threshold) for features in self[:2])
        return self._replace(student=student, teacher=teacher, mask=None)

    def weighted(self, factor: float) -> Stage:
        """Return the stage with its weights multiplied by ``factor``."""
        intra, same, diff = self.weights
        return self._replace(weights=(factor * intra, factor * same, factor * diff))


class Settings(NamedTuple):
    threshold: float | None
    partition: Partition
    eps: float
    form: FormName


def local_correlation_loss(stages: Sequence[Stage], settings: Settings, backend: Backend) -> Tensor:
    """The loss summed over the stages; see ``kdkernels.local_correlation_loss``."""
    student = stages[0].student

    def sums(chosen: str) -> list[list[Sum]]:
        target = target_of(chosen, student)
        plans = plans_of(stages, settings.form, chosen)
        return [explained(plan, stage.problem, target) for stage, plan in zip(stages, plans, strict=True)]

    chosen = LOCAL_CORRELATION.choose(
        backend, student, sums, lambda: max(size_of(settings.form, stage.problem) for stage in stages)
    )
    run = {"reference": _reference, "native": _native, "triton": _triton, "library": _library}[chosen]
    if stages[0].reduction != "batchmean":
        return run(stages, settings)
    factor = per_pair(student.shape[0])
    return multiplied(factor, lambda factor: run([stage.weighted(factor) for stage in stages], settings))


def per_pair(images: int) -> float:
    """Return 1/n², the factor of Eq. 2, which divides by the pairs of images."""
    return 1.0 / (images * images)


def _reference(stages: Sequence[Stage], settings: Settings) -> Tensor:
    with full_precision(stages[0].student.device):
        return torch.stack([_reference_stage(stage, settings) for stage in stages]).sum()


def _reference_stage(stage: Stage, settings: Settings) -> Tensor:
    student, teacher = (patches_of(stage, features, settings, "reference") for features in stage[:2])
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    student, teacher = student.to(dtype), teacher.to(dtype)
    if settings.form == "feature":
        return feature_form(student, teacher, stage.k**2, stage.coefficients)
    return reference.local_correlation_loss(student, teacher, stage.k**2, stage.weights, stage.reduction == "mean")


def _triton(stages: Sequence[Stage], settings: Settings) -> Tensor:
    return torch.stack([_stage_in_parts(stage, settings, "triton", "triton") for stage in stages]).sum()


def _library(stages: Sequence[Stage], settings: Settings) -> Tensor:
    """The patches are no products, so the kernels of the device cut them."""
    of_patches = PATCHES.automatic(stages[0].student)
    return torch.stack([_stage_in_parts(stage, settings, "library", of_patches) for stage in stages]).sum()


def _stage_in_parts(stage: Stage, settings: Settings, backend: Backend, of_patches: Backend) -> Tensor:
    student, teacher = (patches_of(stage, features, settings, of_patches) for features in stage[:2])
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    return congruence(
        student.to(dtype),
        teacher.to(dtype),
        positions=stage.k**2,
        coefficients=stage.coefficients,
        form=settings.form,
        backend=backend,
    )


def _native(stages: Sequence[Stage], settings: Settings) -> Tensor:
    """Every stage of both networks in one call."""
    features = [stage.student for stage in stages] + [stage.teacher for stage in stages]
    arguments = (
        [stage.mask for stage in stages if stage.mask is not None],
        [stage.k for stage in stages],
        stages[0].weights,
        stages[0].reduction == "mean",
        _codes(stages, settings.form),
        settings.threshold,
        settings.partition == "resize",
        settings.eps,
    )
    call = fake.local_correlation.bind("native", 2, arguments)
    kept = arguments[0], arguments[1], settings.threshold, settings.partition == "resize"
    if needs_gradient(*features):
        loss: Tensor = WithBackwardKernel.apply(_loss, _gradients, (call, kept), *distinct(features))[0]
        return loss
    return _loss((call, kept), features, [False] * len(features))[0][0]


def _codes(stages: Sequence[Stage], form: str) -> list[int]:
    """The codes of the plans. A graph of torch.compile serves all sizes, so its plans are made when it runs."""
    if planned_when_it_runs(form, "native"):
        return []
    return [code for plan in plans_of(stages, form, "native") for code in plan.codes]


def _with_plans(arguments: list[Any], backend: str) -> list[Any]:
    """The arguments of the kernel, with the plans that ``_codes`` left open."""
    students, teachers, _, k, weights, mean, codes, *_, wanted, _ = arguments
    if codes:
        return arguments
    reduction: LocalReduction = "mean" if mean else "sum"
    problems = [
        Stage(student, teacher, None, side, tuple(weights), reduction).problem._replace(
            grad_student=bool(wanted[i]), grad_teacher=bool(wanted[len(students) + i])
        )
        for i, (student, teacher, side) in enumerate(zip(students, teachers, k, strict=True))
    ]
    plans = make_plans("auto", tuple(problems), target_of(backend, students[0]))
    return [*arguments[:6], [code for plan in plans for code in plan.codes], *arguments[7:]]


fake.local_correlation.completed = _with_plans


def _loss(
    constants: Any, features: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[tuple[Tensor, ...], Sequence[Tensor], Any]:
    """The loss. Saved are the gradients of the patches, yet to be scaled, which are results for that reason."""
    (run, settings, last), (masks, k, threshold, resize) = constants
    stages = len(features) // 2
    loss, grads = run(features[:stages], features[stages:], *settings, [int(want) for want in wanted], *last)
    shapes = [number for maps in features for number in map_shape(maps)]
    results = loss, *(grad for grad, want in zip(grads, wanted, strict=True) if want)
    return results, (*grads, *masks), (shapes, k, threshold, resize)


def _gradients(grad: Tensor, saved: Sequence[Tensor], kept: Any, wanted: Sequence[bool]) -> list[Tensor]:
    shapes, k, threshold, resize = kept
    rows, masks = saved[: len(wanted)], saved[len(wanted) :]
    backward = fake.local_correlation_backward.sized("native")
    grads: list[Tensor] = backward(grad, rows, shapes, masks, k, threshold, resize)
    return grads


def plans_of(stages: Sequence[Stage], form: str, backend: str) -> tuple[Plan, ...]:
    """Return the forms of every stage's sums. The native operator computes all stages together."""
    problems = tuple(stage.problem for stage in stages)
    return make_plans(form, problems, target_of(backend, stages[0].student))


def patches_of(stage: Stage, features: Tensor, settings: Settings, backend: Backend) -> Tensor:
    return patches(
        features,
        stage.k,
        mask=stage.mask,
        threshold=settings.threshold,
        partition="resize" if settings.partition == "resize" else "exact",  # check has carried out "split"
        eps=settings.eps,
        backend=backend,
    )


def check(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    k: int | Sequence[int],
    weights: Sequence[float],
    mask: Tensor | Sequence[Tensor] | None,
    reduction: LocalReduction,
    settings: Settings,
) -> tuple[list[Stage], Settings]:
    """Check every argument and gather them by stage.

    PyTorch carries out ``partition="split"`` here. Stages and settings returned are of maps that k divides, without
    masks.
    """
    weights = check_settings(k, weights, reduction, settings)
    students = _per_stage("student", student, None)
    count = len(students)
    teachers = _per_stage("teacher", teacher, count)
    masks = [None] * count if mask is None else _per_stage("mask", mask, count)
    if mask is not None and any(m is None for m in masks):
        raise TypeError("mask must hold a tensor for every stage, got None for one")
    ks = _per_stage("k", k, count) if _is_sequence(k) else [k] * count
    checked = [
        _check_stage(f"[{i}]" if count > 1 else "", s, t, m, side, weights, reduction, settings)
        for i, (s, t, m, side) in enumerate(zip(students, teachers, masks, ks, strict=True))
    ]
    if reduction == "batchmean":  # one factor 1/n² for all stages
        for i, stage in enumerate(checked[1:], 1):
            checks.same_batch(f"student[{i}]", stage.student, "student[0]", checked[0].student)
    if settings.partition != "split":
        return checked, settings
    split = [stage.split_first(settings.threshold) for stage in checked]
    return split, settings._replace(threshold=None, partition="exact")


def check_settings(
    k: int | Sequence[int], weights: Sequence[float], reduction: LocalReduction, settings: Settings
) -> tuple[float, float, float]:
    """Check what does not depend on the features. Returns the weights as numbers."""
    checks.one_of("partition", settings.partition, PARTITIONS)
    checks.one_of("reduction", reduction, LOCAL_REDUCTIONS)
    checks.one_of("form", settings.form, FORMS)
    checks.non_negative("eps", settings.eps)
    if settings.threshold is not None:
        checks.finite("threshold", settings.threshold)
    for side in _per_stage("k", k, None) if _is_sequence(k) else [k]:
        checks.positive_int("k", side)
    return _check_weights(weights)


def _check_stage(
    index: str,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    k: int,
    weights: tuple[float, float, float],
    reduction: LocalReduction,
    settings: Settings,
) -> Stage:
    partition = "resize" if settings.partition == "split" else settings.partition  # both take maps of any size
    for name, features in ((f"student{index}", student), (f"teacher{index}", teacher)):
        if isinstance(features, Tensor) and features.dim() == 3:
            shape = tuple(features.shape)
            raise ValueError(
                f"{name} must have shape n x c x h x w, got {shape}; for b x n x c tokens use token_relation_loss"
            )
    check_features(f"student{index}", student, k, partition)
    check_features(f"teacher{index}", teacher, k, partition)
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
        finite = all(map(checks.is_finite, (intra, same, diff)))
    except (TypeError, ValueError):
        finite = False
    if not finite:
        raise ValueError(f"weights must be three finite numbers (intra, inter_same, inter_diff), got {weights!r}")
    return intra, same, diff


def _is_sequence(k: object) -> bool:
    return isinstance(k, Sequence) and not isinstance(k, str)


def _per_stage(name: str, value: object, count: int | None) -> list[Any]:
    if isinstance(value, Tensor):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name} must be a tensor or a sequence of them, one per stage, got {type(value).__name__}")
    if len(value) == 0:
        raise ValueError(f"{name} must hold at least one stage, got an empty sequence")
    if count is not None and len(value) != count:
        raise ValueError(f"{name} must hold one entry per stage of student, {count}, got {len(value)}")
    return list(value)
