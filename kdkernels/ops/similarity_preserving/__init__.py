"""Similarity-preserving distillation (SP): Gram matrices of two networks' samples, their rows normalised, compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import checks
from ...types import FORMS, REDUCTIONS, Backend, FormName, Reduction
from ..autograd import multiplied
from ..congruence.plan import FEATURE, GRAM, Form, Sum, known, planned_when_it_runs, similarity_costs
from ..gram import in_memory_order
from ..operator import Operator
from ..row_masks import to_mean, zeroed
from ..tuning import LARGE_SIMILARITY
from . import fake, reference

SIMILARITY_PRESERVING = Operator(
    "similarity_preserving",
    kernels=(fake.similarity_preserving,),
    native=("cpu",),
    large=LARGE_SIMILARITY,
    memory="a gradient, n x d_S, twice; two strips of min(n, 512) x n, or n (d_S + 2·d_T) and three d x d sums",
    over_ranks="three d x d sums twice (feature form), or twice all ranks' features (Gram form)",
)


def similarity_preserving(
    student: Tensor,
    teacher: Tensor,
    *,
    reduction: Reduction,
    mask: Tensor | None = None,
    form: FormName = "auto",
    backend: Backend = "auto",
) -> Tensor:
    """The difference of two networks' similarities; see ``kdkernels.similarity_preserving_loss``."""
    check(student, teacher, reduction, form, mask)
    scale = 1.0 / student.shape[0] ** 2 if reduction == "mean" else 1.0

    def sums(_: str) -> list[list[Sum]]:
        computed = choose_form(student, teacher, form)
        return [[Sum("all pairs", student.shape[0], 1, computed, form_costs(student, teacher))]]

    def size() -> tuple[int, int]:
        rows, *numbers = map(known, (student.shape[0], student.numel(), teacher.numel()))
        return rows, sum(numbers) // rows

    chosen = SIMILARITY_PRESERVING.choose(backend, student, sums, size)
    feature = None if planned_when_it_runs(form, chosen) else choose_form(student, teacher, form) == FEATURE
    if mask is not None:  # a zero sample adds nothing to the loss, and nothing to the norms of the other samples
        student, teacher = zeroed(mask, (student, teacher))
    # Triton and products read features in the order of memory. No dot product depends on the order of its terms.
    ordered = chosen in ("triton", "library")
    tensors = [in_memory_order(x) for x in (student, teacher)] if ordered else (student, teacher)

    def loss(factor: float) -> Tensor:
        return SIMILARITY_PRESERVING.loss(chosen, tensors, (factor, feature), _reference)

    return to_mean(multiplied(scale, loss), mask if reduction == "mean" else None, power=2)


def _with_form(arguments: list[Any], _: str) -> list[Any]:
    """Return the arguments of the kernel, with the form if it was left open."""
    student, teacher, scale, feature, *wanted = arguments
    if feature is None:
        rows = student.shape[0]
        costs = similarity_costs(rows, student.numel() // rows, teacher.numel() // rows, *wanted)
        feature = costs[FEATURE] < costs[GRAM]
    return [student, teacher, scale, feature, *wanted]


fake.similarity_preserving.completed = _with_form
fake.similarity_preserving.left_open = "feature"


def choose_form(student: Tensor, teacher: Tensor, form: str) -> Form:
    """Return the cheaper form by the cost model, or the named form."""
    if form != "auto":
        return GRAM if form == "gram" else FEATURE
    costs = form_costs(student, teacher)
    return FEATURE if costs[FEATURE] < costs[GRAM] else GRAM


def form_costs(student: Tensor, teacher: Tensor) -> dict[Form, int]:
    rows = known(student.shape[0])
    d_student, d_teacher = (known(features.numel()) // rows for features in (student, teacher))
    of_student, of_teacher = (torch.is_grad_enabled() and features.requires_grad for features in (student, teacher))
    return similarity_costs(rows, d_student, d_teacher, of_student, of_teacher)


def check(student: object, teacher: object, reduction: str, form: str, mask: object = None) -> None:
    student, teacher = (_features(name, value) for name, value in (("student", student), ("teacher", teacher)))
    checks.same_batch("teacher", teacher, "student", student)
    checks.same_device("teacher", teacher, "student", student)
    checks.sample_mask(mask, "student", student)
    check_settings(reduction, form)


def check_settings(reduction: str, form: str) -> None:
    checks.one_of("reduction", reduction, REDUCTIONS)
    checks.one_of("form", form, FORMS)


def _features(name: str, value: object) -> Tensor:
    return checks.tensor(name, value, max(value.dim(), 2) if isinstance(value, Tensor) else 2, "n x ...")


def _reference(student: Tensor, teacher: Tensor, scale: float, feature: bool) -> Tensor:
    run = reference.feature_form if feature else reference.gram_form
    return run(student, teacher, scale)
