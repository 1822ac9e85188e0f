"""What ``divergence`` and ``divergence_backward`` expect of their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from ...boundary import FULL_FLOATS, Check

# Numbers that the forward kernel saves for each row. A call with moments saves all of them.
SAVED_NUMBERS, SAVED_MOMENTS = 5, 16


def check_divergence(student: Tensor, teacher: Tensor, temperatures: Tensor, kind: int, beta: float) -> None:
    _check_rows(Check("divergence"), student, teacher, temperatures, kind, beta)


def check_divergence_backward(
    grad_losses: Tensor,
    student: Tensor,
    teacher: Tensor,
    temperatures: Tensor,
    saved: Tensor,
    kind: int,
    beta: float,
    standardize: bool,
    moments: bool,
    grad_student: bool,
    grad_teacher: bool,
    to_temperatures: bool,
) -> None:
    check = Check("divergence_backward")
    _check_rows(check, student, teacher, temperatures, kind, beta)
    check.tensor("grad_losses", grad_losses, "outer inner", FULL_FLOATS)
    if not moments and needs_moments(kind, standardize, grad_student, grad_teacher, to_temperatures):
        check.fail("moments must be true for these gradients, got false")
    check.bind("numbers", SAVED_MOMENTS if moments else SAVED_NUMBERS)
    check.tensor("saved", saved, "outer inner numbers", FULL_FLOATS)
    of, other = (teacher, "teacher") if teacher.dtype == torch.float64 else (student, "student")
    check.compute_type("saved", saved, other, of)


def needs_moments(kind: int, standardize: bool, student: bool, teacher: bool, temperatures: bool) -> bool:
    """Return whether gradients need moments. In a KL divergence, the gradient to the first distribution does."""
    first = student if kind == 1 else teacher
    return temperatures or first or ((standardize or kind == 2) and (student or teacher))


def _check_rows(check: Check, student: Tensor, teacher: Tensor, temperatures: Tensor, kind: int, beta: float) -> None:
    check.tensor("student", student, "outer inner K")
    check.tensor("teacher", teacher, "outer inner K")
    check.tensor("temperatures", temperatures, "outer inner", FULL_FLOATS)
    if not 0 <= kind <= 2:
        check.fail(f"kind must be 0 (forward), 1 (reverse) or 2 (jsd), got {kind}")
    if not 0 <= beta <= 1:
        check.fail(f"beta must be a number in [0, 1], got {beta:g}")
