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
# What a launch of a CUDA kernel costs, in the same: 3 µs of an H100's 494 tf32 TFLOP/s, of which a multiply-add with
# the accuracy of float32 takes six. No kernel here comes near that rate; but where launches matter, one has too few
# blocks to fill the GPU, and those of further stages run beside them. Not measured yet.
LAUNCH = 250_000_000
# Up to how many rows the CUDA kernels hold D as a whole (csrc/cuda/congruence.cu): of more, its strips take turns.
ONE_STRIP = 1024
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


def known(size: int) -> int:
    """A size, for the cost model: while torch.export traces sizes without a number, that of its example.

    The program is for any batch, and keeps the forms that are cheapest for the example.
    """
    return size.node.hint if isinstance(size, torch.SymInt) and size.node.has_hint() else size


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


class Problem(NamedTuple):
    """What the plan of one loss hangs on: ``rows`` is N, ``positions`` the number of patches per image."""

    coefficients: Coefficients
    rows: int
    positions: int
    d_student: int
    d_teacher: int
    grad_student: bool
    grad_teacher: bool


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
    """Choose the form of each sum, as ``make_plans`` does for a loss on its own whose kernels need no launch."""
    sizes = known(rows), positions, known(d_student), known(d_teacher)
    problem = Problem(coefficients, *sizes, grad_student, grad_teacher)
    return make_plans(form, (problem,), launched=False)[0]


def make_plans(form: str, problems: tuple[Problem, ...], *, launched: bool) -> tuple[Plan, ...]:
    """Choose the forms of losses that are computed together, by kernels that have to be ``launched`` or not."""
    choose = _make_plans if torch.compiler.is_compiling() else _make_plans_once
    return choose(form, problems, launched)


def _make_plans(form: str, problems: tuple[Problem, ...], launched: bool) -> tuple[Plan, ...]:
    plans = tuple(_make_plan(form, problem, not launched) for problem in problems)
    if form != "auto" or not launched or any(problem.rows > ONE_STRIP for problem in problems):
        return plans
    choices = [plans, *(tuple(_make_plan(named, problem) for problem in problems) for named in FORMS[1:])]
    costs = [
        LAUNCH * launches(choice, problems) + sum(_cost(*one) for one in zip(choice, problems, strict=True))
        for choice in choices
    ]
    return choices[costs.index(min(costs))]


# Training asks for the same few plans at every step, and the arithmetic costs more than a small loss.
_make_plans_once = functools.lru_cache(maxsize=1024)(_make_plans)


def _make_plan(form: str, problem: Problem, mixed: bool = True) -> Plan:
    """The cheapest of a loss on its own; ``mixed`` says whether that form is there."""
    coefficients, rows, positions, *sizes = problem
    intra, inter_same = (choose_form(form, False, size, *sizes) for size in (positions, rows // positions))
    if form != "auto" or not coefficients.full:
        return Plan(choose_form(form, mixed, rows, *sizes), intra, inter_same)
    # Tiles of the whole Gram matrix serve the other two sums for nothing.
    plans = [Plan(full, intra, inter_same) for full in candidates(mixed, problem.grad_teacher)]
    costs = [_cost(plan, problem) for plan in plans]
    return plans[costs.index(min(costs))]


def _sums(plan: Plan, problem: Problem) -> list[tuple[Form, int, int]]:
    """The sums to be computed: the form of each, its number of rows, how many of them there are."""
    coefficients, rows, positions, *_ = problem
    sums = [(plan.full, rows, 1)] if coefficients.full else []
    if coefficients.full and plan.full == GRAM:
        return sums
    images = rows // positions
    sums += [(plan.intra, positions, images)] if coefficients.intra else []
    sums += [(plan.inter_same, images, positions)] if coefficients.inter_same else []
    return sums


def _cost(plan: Plan, problem: Problem) -> int:
    """Modelled multiply-adds of a whole loss."""
    return sum(count * multiply_adds(form, rows, *problem[3:]) for form, rows, count in _sums(plan, problem))


def launches(plans: tuple[Plan, ...], problems: tuple[Problem, ...]) -> int:
    """How many CUDA kernels it takes where D is one strip: in the order of the sums, the tiles of all Gram matrices, or
    the products of the feature form and what their parts add up to; then all gradients."""
    forms = [[form for form, *_ in _sums(*one)] for one in zip(plans, problems, strict=True)]
    turns = [{sums[turn] for sums in forms if turn < len(sums)} for turn in range(3)]
    return sum((GRAM in turn) + 2 * (FEATURE in turn) + 1 for turn in turns if turn)
