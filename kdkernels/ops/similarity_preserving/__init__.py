"""Similarity-preserving distillation (SP): Gram matrices of two networks' samples, their rows normalised, compared."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends, checks
from ..congruence.plan import FORMS
from . import reference

REDUCTIONS = ("mean", "sum")


def similarity_preserving(
    student: Tensor, teacher: Tensor, *, reduction: str, form: str = "auto", backend: str = "auto"
) -> Tensor:
    """The difference of two networks' similarities; see ``kdkernels.similarity_preserving_loss``."""
    check(student, teacher, reduction, form)
    scale = 1.0 / student.shape[0] ** 2 if reduction == "mean" else 1.0
    run = {"reference": _reference}[backends.choose("reference" if backend == "auto" else backend, student)]
    return run(student, teacher, scale, form)


def check(student: object, teacher: object, reduction: str, form: str) -> None:
    student, teacher = (_features(name, value) for name, value in (("student", student), ("teacher", teacher)))
    checks.same_batch("teacher", teacher, "student", student)
    checks.same_device("teacher", teacher, "student", student)
    checks.one_of("reduction", reduction, REDUCTIONS)
    checks.one_of("form", form, FORMS)


def _features(name: str, value: object) -> Tensor:
    return checks.tensor(name, value, max(value.dim(), 2) if isinstance(value, Tensor) else 2, "n x ...")


def _reference(student: Tensor, teacher: Tensor, scale: float, form: str) -> Tensor:
    run = reference.feature_form if form == "feature" else reference.gram_form
    # Autocast would run the products in half precision.
    with torch.autocast(student.device.type, enabled=False):
        return run(student, teacher, scale)
