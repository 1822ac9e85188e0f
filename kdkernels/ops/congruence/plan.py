"""The two exact forms of a congruence loss and the cost model that picks between them.

For rows X (N x d_S) and Y (N x d_T) the loss is made of three squared norms, and each has two equal expressions:

    student   ‖X Xᵀ‖² = ‖XᵀX‖²          its gradient half is (X Xᵀ) X = X (XᵀX)
    teacher   ‖Y Yᵀ‖² = ‖YᵀY‖²
    cross     ⟨X Xᵀ, Y Yᵀ⟩ = ‖YᵀX‖²     its gradient half is (Y Yᵀ) X = Y (YᵀX)

The first of each is sample space ("gram", N x N, computed in tiles), the second feature space ("feature", d x d). With all
three in sample space the difference D = X Xᵀ − Y Yᵀ is formed entry by entry and nothing cancels.
"""

from __future__ import annotations

from typing import NamedTuple

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
        if self in (GRAM, FEATURE):
            return "gram" if self == GRAM else "feature"
        return ", ".join(f"{name}: {'feature' if feature else 'gram'}" for name, feature in self._asdict().items())


GRAM = Form(False, False, False)
FEATURE = Form(True, True, True)
# Sample space for the cross term needs the teacher's Gram; with both Grams at hand it is never worth leaving.
MIXED = (Form(True, False, False), Form(True, False, True), Form(False, True, True))


# What it costs to square, weigh and store an entry of a Gram tile, in multiply-adds of the products.
TILE_ENTRY = 16


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


def multiply_adds(
    form: Form, rows: int, d_student: int, d_teacher: int, grad_student: bool, grad_teacher: bool
) -> int:
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
    """The forms worth comparing. Mixed ones serve the sum over all pairs, and a teacher that does not learn."""
    return (GRAM, FEATURE, *MIXED) if whole and not grad_teacher else (GRAM, FEATURE)


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


def make_plan(
    form: str,
    rows: int,
    positions: int,
    d_student: int,
    d_teacher: int,
    grad_student: bool,
    grad_teacher: bool,
) -> Plan:
    """Choose the form of each sum. ``rows`` is N, ``positions`` the number of patches per image."""
    sizes = (rows, positions, rows // positions)
    widths_and_wishes = (d_student, d_teacher, grad_student, grad_teacher)
    return Plan(*(choose_form(form, i == 0, size, *widths_and_wishes) for i, size in enumerate(sizes)))
