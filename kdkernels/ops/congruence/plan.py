"""The two exact forms of a congruence loss and the cost model that picks between them.

For rows X (N x d_S) and Y (N x d_T) the loss is made of three squared norms, and each has two equal expressions:

    student   ‖X Xᵀ‖² = ‖XᵀX‖²          its gradient half is (X Xᵀ) X = X (XᵀX)
    teacher   ‖Y Yᵀ‖² = ‖YᵀY‖²
    cross     ⟨X Xᵀ, Y Yᵀ⟩ = ‖YᵀX‖²     its gradient half is (Y Yᵀ) X = Y (YᵀX)

The first of each is sample space ("gram", N x N, computed in tiles), the second feature space ("feature", d x d). With
all three in sample space the difference D = X Xᵀ − Y Yᵀ is formed entry by entry and nothing cancels.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

FORMS = ("auto", "gram", "feature")


class Coefficients(NamedTuple):
    """Factors of ΣD² over all pairs, over pairs of one image, over pairs of one position, and over the diagonal."""

    full: float
    intra: float
    inter_same: float
    diagonal: float


class Form(NamedTuple):
    """The space in which each term of one loss is computed: True for feature space."""

    student: bool
    teacher: bool
    cross: bool

    @property
    def code(self) -> int:
        """The number by which the native operators know the form."""
        return self.student + 2 * self.teacher + 4 * self.cross

    def __str__(self) -> str:
        if self == MIXED:
            return "mixed"
        return "gram" if self == GRAM else "feature"


GRAM = Form(False, False, False)
FEATURE = Form(True, True, True)
# The student's norm over features, the teacher's and the cross term from the teacher's Gram: for N < d_T and a narrow
# student. Every other combination costs more than one of these three, whatever the sizes.
MIXED = Form(True, False, False)

# What it costs to square, weigh and store an entry of a Gram tile, in multiply-adds of the products.
TILE_ENTRY = 16
# Up to how many rows SP holds its Gram matrices (csrc/cpu/similarity_preserving.cpp).
HELD_ROWS = 512


class Plan(NamedTuple):
    """The form of each of the three sums: all pairs, pairs of one image, pairs of one position.

    When ``full`` is the Gram form, its tiles serve the other two as well.
    """

    full: Form
    intra: Form
    inter_same: Form

    @property
    def codes(self) -> list[int]:
        return [form.code for form in self]


def multiply_adds(form: Form, rows: int, d_student: int, d_teacher: int, grad_student: bool, grad_teacher: bool) -> int:
    """Modelled multiply-adds of one loss over ``rows`` rows. Symmetric products are computed by halves."""

    def own(feature: bool, d: int, grad: bool) -> int:
        product = rows * d * (d if feature else rows)
        return product // 2 + (product if grad else 0)

    total = own(form.student, d_student, grad_student) + own(form.teacher, d_teacher, grad_teacher)
    if form.cross:
        total += rows * d_student * d_teacher * (1 + grad_student + grad_teacher)
    elif form.student:
        total += rows * rows * d_student  # (Y Yᵀ) X: the cross term and its gradient at once
    return total + (0 if form == FEATURE else TILE_ENTRY * rows * rows)


def candidates(whole: bool, grad_teacher: bool) -> tuple[Form, ...]:
    """The forms worth comparing. The mixed one serves the sum over all pairs and a teacher that does not learn."""
    return (GRAM, FEATURE, MIXED) if whole and not grad_teacher else (GRAM, FEATURE)


def choose_form(
    form: str, whole: bool, rows: int, d_student: int, d_teacher: int, grad_student: bool, grad_teacher: bool
) -> Form:
    """The cheapest form by the cost model, or the one asked for by name."""
    if form == "gram":
        return GRAM
    if form == "feature":
        return FEATURE

    forms = candidates(whole, grad_teacher)
    costs = [multiply_adds(f, rows, d_student, d_teacher, grad_student, grad_teacher) for f in forms]
    return forms[costs.index(min(costs))]  # min(forms, key=...) is more than torch.compile follows with dynamic shapes


def similarity_costs(rows: int, d_student: int, d_teacher: int, grad_student: bool, grad_teacher: bool) -> dict:
    """Modelled multiply-adds of SP in both forms. Its Gram matrices are computed once if they are held, else twice."""
    again = 1 if rows <= HELD_ROWS else 2
    gram = rows * rows * (again * (d_student + d_teacher) // 2 + 3 * TILE_ENTRY)
    feature = 2 * rows * (d_student**2 + d_teacher**2 + d_student * d_teacher)
    for d, other, grad in ((d_student, d_teacher, grad_student), (d_teacher, d_student, grad_teacher)):
        if grad:
            gram += rows * rows * d
            feature += rows * d * (2 * d + 3 * other)
    return {GRAM: gram, FEATURE: feature}


def make_plan(
    form: str,
    coefficients: Coefficients,
    rows: int,
    positions: int,
    d_student: int,
    d_teacher: int,
    grad_student: bool,
    grad_teacher: bool,
) -> Plan:
    """Choose the form of each sum. ``rows`` is N, ``positions`` the number of patches per image."""
    choose = _make_plan if torch.compiler.is_compiling() else _make_plan_once
    return choose(form, coefficients, rows, positions, d_student, d_teacher, grad_student, grad_teacher)


def _make_plan(
    form: str,
    coefficients: Coefficients,
    rows: int,
    positions: int,
    d_student: int,
    d_teacher: int,
    grad_student: bool,
    grad_teacher: bool,
) -> Plan:
    images = rows // positions
    sizes = (d_student, d_teacher, grad_student, grad_teacher)
    plan = Plan(
        choose_form(form, True, rows, *sizes),
        choose_form(form, False, positions, *sizes),
        choose_form(form, False, images, *sizes),
    )
    if form == "auto" and plan.full != GRAM and coefficients.full:
        # Tiles of the whole Gram matrix would serve the other two sums for nothing.
        cost = multiply_adds(plan.full, rows, *sizes)
        cost += images * multiply_adds(plan.intra, positions, *sizes) if coefficients.intra else 0
        cost += positions * multiply_adds(plan.inter_same, images, *sizes) if coefficients.inter_same else 0
        if multiply_adds(GRAM, rows, *sizes) < cost:
            return plan._replace(full=GRAM)
    return plan


# Training asks for the same few plans at every step, and the arithmetic costs more than a small loss.
_make_plan_once = functools.lru_cache(maxsize=1024)(_make_plan)
