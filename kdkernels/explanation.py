"""What a call would do, without doing it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import backends, checks, functional
from .ops import (
    correlation_congruence,
    feature_mse,
    gram,
    icc,
    kd,
    local_correlation,
    patches,
    rkd,
    similarity_preserving,
)
from .ops.congruence.plan import FEATURE, GRAM, TILE_ENTRY, Form, Plan, candidates, multiply_adds
from .ops.local_correlation import Stage
from .ops.local_correlation.reference import RELATIONS

if TYPE_CHECKING:
    from .distributed import Ranks


@dataclass(frozen=True)
class Sum:
    """One of the sums that make up a stage's loss, with the modelled cost of each form in multiply-adds."""

    name: str
    rows: int
    count: int
    form: Form
    costs: dict[Form, int]

    def __str__(self) -> str:
        costs = ", ".join(f"{form} {cost * self.count / 1e9:.3g}" for form, cost in self.costs.items())
        return f"{self.name}: {self.form} form ({self.count} x {self.rows} rows; in 1e9 multiply-adds: {costs})"


@dataclass(frozen=True)
class Explanation:
    """The backend a call takes, why the others cannot run it, and the form of each sum of each stage."""

    name: str
    backend: str
    obstacles: dict[str, str]
    stages: list[list[Sum]]

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.backend} backend"]
        lines += [f"  not {backend}: {reason}" for backend, reason in self.obstacles.items()]
        for i, sums in enumerate(self.stages):
            lines += [f"  stage {i}"] + [f"    {part}" for part in sums]
        return "\n".join(lines)


def explain(name: str, *args: object, **settings: object) -> Explanation:
    """Which backend and form a call would take, and the modelled cost of each form.

    Args:
        name: of a function that takes ``backend``, such as "local_correlation_loss" or "kd_loss".
        args, settings: as that function takes them. With a group every rank has to ask, and costs are those of a rank:
            a number moved to another counts as many multiply-adds.

    Returns:
        An ``Explanation`` to print.

    Raises:
        ValueError: for another name; and whatever the call itself would raise for its arguments.
    """
    explainers = {
        "correlation_congruence_loss": _correlation_congruence_stages,
        "similarity_preserving_loss": _similarity_stages,
        "local_correlation_loss": _local_correlation_stages,
        "inter_class_correlation": _map_stages,
        "inter_class_correlation_loss": _inter_class_stages,
        "kd_loss": _kd_stages,
        "teacher_free_kd_loss": _teacher_free_stages,
        "hint_loss": _hint_stages,
        "local_correlation": _patch_stages,
        "relational_kd_loss": _rkd_stages,
        "similarity_matrices": _gram_stages,
        "cross_layer_mse": _feature_mse_stages,
    }
    if name not in explainers:
        raise ValueError(f"name must be one of {tuple(explainers)}, got {name!r}")
    bound = inspect.signature(getattr(functional, name)).bind(*args, **settings)
    bound.apply_defaults()
    tensor, stages = explainers[name](**bound.arguments)
    choosers = {
        "relational_kd_loss": rkd.choose_backend,
        "similarity_preserving_loss": similarity_preserving.choose_backend,
    }
    backend = choosers.get(name, backends.choose)(bound.arguments["backend"], tensor)
    reasons = {other: backends.why_not(other, tensor) for other in backends.BACKENDS[1:]}
    if name == "relational_kd_loss" and reasons["triton"] is None:
        reasons["triton"] = rkd.NO_TRITON
    return Explanation(name, backend, {b: reason for b, reason in reasons.items() if reason is not None}, stages)


def _kd_stages(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float, **_) -> tuple[Tensor, list]:
    kd.check(student_logits, teacher_logits, temperature)
    return student_logits, []


def _teacher_free_stages(
    student_logits: Tensor, own_logits: Tensor, labels: Tensor, *, alpha: float, temperature: float, **_
) -> tuple[Tensor, list]:
    checks.fraction("alpha", alpha)
    kd.check(student_logits, own_logits, temperature)
    checks.labels(labels, student_logits.shape[0])
    return student_logits, []


def _hint_stages(student: Tensor, teacher: Tensor, **_) -> tuple[Tensor, list]:
    checks.maps(student, teacher)
    return student, []


def _patch_stages(features: Tensor, k: int, relation: str, *, partition: str, **_) -> tuple[Tensor, list]:
    checks.one_of("relation", relation, RELATIONS)
    patches.check("features", features, k, partition)
    return features, []


def _rkd_stages(
    student: Tensor, teacher: Tensor, *, distance_weight: float, angle_weight: float, **_
) -> tuple[Tensor, list]:
    rkd.check(student, teacher, distance_weight, angle_weight)
    return student, []


def _gram_stages(features, **_) -> tuple[Tensor, list]:
    return gram.check(features)[0], []


def _feature_mse_stages(projected, targets, weights: Tensor, *, reduction: str, **_) -> tuple[Tensor, list]:
    feature_mse.check(projected, targets, weights, reduction)
    return weights, []


def _map_stages(logits: Tensor, **_) -> tuple[Tensor, list]:
    icc.check_map(logits)
    return logits, []


def _inter_class_stages(student_logits: Tensor, teacher_logits: Tensor, *, reduction: str, **_) -> tuple[Tensor, list]:
    icc.check(student_logits, teacher_logits, reduction)
    return student_logits, []


def _correlation_congruence_stages(
    student: Tensor, teacher: Tensor, *, kernel: str, gamma: float, order: int, reduction: str, form: str, **_
) -> tuple[Tensor, list]:
    metric = correlation_congruence.Kernel(kernel, gamma, order)
    correlation_congruence.check(student, teacher, metric, reduction, form)
    plan = correlation_congruence.make_plan(student, teacher, metric, form)
    rows = student.shape[0]
    wanted = [torch.is_grad_enabled() and embeddings.requires_grad for embeddings in (student, teacher)]
    forms = candidates(True, wanted[1]) if kernel == "bilinear" else (GRAM,)
    if kernel == "mmd":
        costs = {GRAM: TILE_ENTRY * rows**2}
    else:
        costs = {form: multiply_adds(form, rows, student.shape[1], teacher.shape[1], *wanted) for form in forms}
    return student, [[Sum("all pairs", rows, 1, plan.full, costs)]]


def _similarity_stages(student: Tensor, teacher: Tensor, *, reduction: str, form: str, **_) -> tuple[Tensor, list]:
    similarity_preserving.check(student, teacher, reduction, form)
    chosen = similarity_preserving.choose_form(student, teacher, form)
    costs = similarity_preserving.form_costs(student, teacher)
    return student, [[Sum("all pairs", student.shape[0], 1, chosen, costs)]]


def _local_correlation_stages(
    student, teacher, k, *, weights, mask, threshold, partition, reduction, eps, form, backend, group, **_
) -> tuple[Tensor, list]:
    settings = local_correlation.Settings(threshold, partition, eps, form)
    stages = local_correlation.check(student, teacher, k, weights, mask, reduction, settings)
    if group is not None:
        from .ops.local_correlation.distributed import meet

        ranks = meet(stages, settings, group)
        return stages[0].student, [[_sum_over_ranks(ranks, stage, form)] for stage in stages]
    plans = local_correlation.plans_of(stages, form, backends.choose(backend, stages[0].student))
    return stages[0].student, [_sums(*one) for one in zip(stages, plans, strict=True)]


def _sum_over_ranks(ranks: Ranks, stage: Stage, form: str) -> Sum:
    from .ops.congruence.distributed import costs

    by_position = stage.coefficients_for(ranks.samples).inter_same != 0
    modelled = costs(ranks, stage.k**2, *stage.lengths, by_position)
    cost = {named: round(modelled[str(named)]) for named in (GRAM, FEATURE)}
    chosen = min(cost, key=cost.__getitem__) if form == "auto" else {"gram": GRAM, "feature": FEATURE}[form]
    return Sum(f"all pairs over {ranks.world} ranks", ranks.samples * stage.k**2, 1, chosen, cost)


def _sums(stage: Stage, plan: Plan) -> list[Sum]:
    images, positions = stage.student.shape[0], stage.k**2
    coefficients = stage.coefficients
    sums = [
        Sum("all pairs", images * positions, 1, plan.full, _costs(stage, images * positions, True)),
        Sum("pairs of one image", positions, images, plan.intra, _costs(stage, positions, False)),
        Sum("pairs of one position", images, positions, plan.inter_same, _costs(stage, images, False)),
    ]
    if coefficients.full and plan.full == GRAM:
        return sums[:1]  # its tiles hold every pair, and the other sums are weights on them
    return [part for part, coefficient in zip(sums, coefficients, strict=False) if coefficient]


def _costs(stage: Stage, rows: int, whole: bool) -> dict[Form, int]:
    forms = candidates(whole, stage.wanted[1])
    return {form: multiply_adds(form, rows, *stage.lengths, *stage.wanted) for form in forms}
