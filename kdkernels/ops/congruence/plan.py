"""The two exact forms of a congruence loss, and the cost model that chooses between them.

For rows X (N x d_S) and Y (N x d_T) the loss consists of three squared norms. Each has two equal expressions:

    student   ‖X Xᵀ‖² = ‖XᵀX‖²          its gradient half is (X Xᵀ) X = X (XᵀX)
    teacher   ‖Y Yᵀ‖² = ‖YᵀY‖²
    cross     ⟨X Xᵀ, Y Yᵀ⟩ = ‖YᵀX‖²     its gradient half is (Y Yᵀ) X = Y (YᵀX)

The first expression is in sample space ("gram", N x N, computed in tiles), the second in feature space ("feature", d x
d). With all three norms in sample space, the difference D = X Xᵀ − Y Yᵀ is computed entry by entry, and nothing
cancels.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...types import FORMS


class Coefficients(NamedTuple):
    """The factors of ΣD² over all pairs, pairs of one image, pairs of one position, and the diagonal."""

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
        """Return the number of the form for the native operators."""
        return self.student + 2 * self.teacher + 4 * self.cross

    def __str__(self) -> str:
        if self == MIXED:
            return "mixed"
        return "gram" if self == GRAM else "feature"


GRAM = Form(False, False, False)
FEATURE = Form(True, True, True)
# The student's norm in feature space, and the teacher's norm and the cross term from the teacher's Gram matrix: for N <
# d_T and a narrow student. For any sizes, every other combination costs more than one of these three.
MIXED = Form(True, False, False)

# The cost to square, weight and store an entry of a Gram tile, in multiply-adds of the products.
TILE_ENTRY = 16
# The cost of a CUDA kernel launch in multiply-adds: 3 µs of an H100's 494 tf32 TFLOP/s, where a multiply-add with
# float32 accuracy takes six operations. No kernel here reaches this rate. But where launches matter, a kernel has too
# few blocks to fill the GPU, and the blocks of other stages run at the same time. Not measured yet.
LAUNCH = 250_000_000
# Up to this number of rows, the CUDA kernels hold D as one strip (csrc/cuda/congruence.cu).
ONE_STRIP = 1024
# Up to this number of rows, SP keeps its Gram matrices (csrc/cpu/similarity_preserving.cpp).
HELD_ROWS = 512


class Plan(NamedTuple):
    """The form of each of the three sums: all pairs, pairs of one image, pairs of one position.

    If ``full`` is the Gram form, its tiles also serve the other two sums.
    """

    full: Form
    intra: Form
    inter_same: Form

    @property
    def codes(self) -> list[int]:
        return [form.code for form in self]


def known(size: int) -> int:
    """Return a size for the cost model. For a symbolic size of torch.export, it is the size of the example.

    The program takes any batch, with the forms that are cheapest for the example.
    """
    return size.node.hint if isinstance(size, torch.SymInt) and size.node.has_hint() else size


def multiply_adds(form: Form, rows: int, d_student: int, d_teacher: int, grad_student: bool, grad_teacher: bool) -> int:
    """Return the modelled multiply-adds of one loss over ``rows`` rows. Symmetric products count half."""

    def own(feature: bool, d: int, grad: bool) -> int:
        product = rows * d * (d if feature else rows)
        return product // 2 + (product if grad else 0)

    total = own(form.student, d_student, grad_student) + own(form.teacher, d_teacher, grad_teacher)
    if form.cross:
        total += rows * d_student * d_teacher * (1 + grad_student + grad_teacher)
    elif form.student:
        total += rows * rows * d_student  # (Y Yᵀ) X gives the cross term and its gradient
    return total + (0 if form == FEATURE else TILE_ENTRY * rows * rows)


def candidates(whole: bool, grad_teacher: bool) -> tuple[Form, ...]:
    """Return the forms to compare. The mixed form is for the sum over all pairs and a fixed teacher."""
    return (GRAM, FEATURE, MIXED) if whole and not grad_teacher else (GRAM, FEATURE)


def choose_form(
    form: str, whole: bool, rows: int, d_student: int, d_teacher: int, grad_student: bool, grad_teacher: bool
) -> Form:
    """Return the cheapest form by the cost model, or the named form."""
    if form == "gram":
        return GRAM
    if form == "feature":
        return FEATURE

    forms = candidates(whole, grad_teacher)
    costs = [multiply_adds(f, rows, d_student, d_teacher, grad_student, grad_teacher) for f in forms]
    return forms[costs.index(min(costs))]  # torch.compile cannot trace min(forms, key=...) with dynamic shapes


def similarity_costs(
    rows: int, d_student: int, d_teacher: int, grad_student: bool, grad_teacher: bool
) -> dict[Form, int]:
    """Return the modelled multiply-adds of SP in both forms. Its Gram matrices are computed twice unless
    they are kept.
    """
    again = 1 if rows <= HELD_ROWS else 2
    gram = rows * rows * (again * (d_student + d_teacher) // 2 + 3 * TILE_ENTRY)
    feature = 2 * rows * (d_student**2 + d_teacher**2 + d_student * d_teacher)
    for d, other, grad in ((d_student, d_teacher, grad_student), (d_teacher, d_student, grad_teacher)):
        if grad:
            gram += rows * rows * d
            feature += rows * d * (2 * d + 3 * other)
    return {GRAM: gram, FEATURE: feature}


class Problem(NamedTuple):
    """The numbers that determine the plan of a loss. ``rows`` is N, ``positions`` is the number of patches
    per image.
    """

    coefficients: Coefficients
    rows: int
    positions: int
    d_student: int
    d_teacher: int
    grad_student: bool
    grad_teacher: bool


# The kernels that run: the CPU's, CUDA's or Triton's. Only the CPU's have the mixed form. The reference counts as
# these, and PyTorch's matrix products count as Triton's.
Target = Literal["cpu", "cuda", "triton"]


def target_of(backend: str, tensor: Tensor) -> Target:
    if backend == "native" and tensor.is_cuda:
        return "cuda"
    return "triton" if backend in ("triton", "library") else "cpu"


def planned_when_it_runs(form: str, backend: str) -> bool:
    """Return whether a kernel's forms are left open. A graph of torch.compile serves all sizes, so it would otherwise
    hold only for sizes with equal plans.
    """
    tracing = torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()
    return form == "auto" and backend != "reference" and tracing


def make_plans(form: str, problems: tuple[Problem, ...], target: Target) -> tuple[Plan, ...]:
    """Return the forms of losses that one call computes together."""
    choose = _make_plans if torch.compiler.is_compiling() else _make_plans_once
    return choose(form, problems, target)


def _make_plans(form: str, problems: tuple[Problem, ...], target: Target) -> tuple[Plan, ...]:
    plans = tuple(_make_plan(form, problem, target == "cpu") for problem in problems)
    if form != "auto" or target != "cuda" or any(problem.rows > ONE_STRIP for problem in problems):
        return plans
    choices = [plans, *(tuple(_make_plan(named, problem, False) for problem in problems) for named in FORMS[1:])]
    costs = [
        LAUNCH * launches(choice, problems) + sum(_cost(*one) for one in zip(choice, problems, strict=True))
        for choice in choices
    ]
    return choices[costs.index(min(costs))]


# Cached, because training needs the same few plans in every step, and computing them costs more than a small loss.
_make_plans_once = functools.lru_cache(maxsize=1024)(_make_plans)


def _make_plan(form: str, problem: Problem, mixed: bool) -> Plan:
    """Return the cheapest plan of a single loss. ``mixed`` says whether the mixed form exists."""
    coefficients, rows, positions = problem[:3]
    sizes = problem[3:]
    intra, inter_same = (choose_form(form, False, size, *sizes) for size in (positions, rows // positions))
    if form != "auto" or not coefficients.full:
        return Plan(choose_form(form, mixed, rows, *sizes), intra, inter_same)
    # Tiles of the whole Gram matrix also serve the other two sums without cost.
    plans = [Plan(full, intra, inter_same) for full in candidates(mixed, problem.grad_teacher)]
    costs = [_cost(plan, problem) for plan in plans]
    return plans[costs.index(min(costs))]


def size_of(form: str, problem: Problem) -> tuple[int, int]:
    """Return rows and columns of a Gram form with as many products. The feature form has fewer for the same rows."""
    columns = problem.d_student + problem.d_teacher
    return math.isqrt(_cost(_make_plan(form, problem, False), problem) // columns), columns


def _sums(plan: Plan, problem: Problem) -> list[tuple[Form, int, int]]:
    """Return the sums: the form, the number of rows, and the count of each."""
    coefficients, rows, positions, *_ = problem
    sums = [(plan.full, rows, 1)] if coefficients.full else []
    if coefficients.full and plan.full == GRAM:
        return sums
    images = rows // positions
    sums += [(plan.intra, positions, images)] if coefficients.intra else []
    sums += [(plan.inter_same, images, positions)] if coefficients.inter_same else []
    return sums


def _cost(plan: Plan, problem: Problem) -> int:
    """Return the modelled multiply-adds of a whole loss."""
    return sum(count * multiply_adds(form, rows, *problem[3:]) for form, rows, count in _sums(plan, problem))


def launches(plans: tuple[Plan, ...], problems: tuple[Problem, ...]) -> int:
    """Return the number of CUDA launches if D is one strip. In the order of the sums: the tiles of all Gram matrices,
    or the products of the feature form and the sums of their parts. Then all gradients.
    """
    forms = [[form for form, *_ in _sums(*one)] for one in zip(plans, problems, strict=True)]
    turns = [{sums[turn] for sums in forms if turn < len(sums)} for turn in range(3)]
    return sum((GRAM in turn) + 2 * (FEATURE in turn) + 1 for turn in turns if turn)


@dataclass(frozen=True)
class Sum:
    """One of the sums of a stage's loss, with the modelled cost of each form in multiply-adds."""

    name: str
    rows: int
    count: int
    form: Form
    costs: dict[Form, int]

    def __str__(self) -> str:
        costs = ", ".join(f"{form} {cost * self.count / 1e9:.3g}" for form, cost in self.costs.items())
        return f"{self.name}: {self.form} form ({self.count} x {self.rows} rows; in 1e9 multiply-adds: {costs})"


def explained(plan: Plan, problem: Problem, target: Target) -> list[Sum]:
    """Return the sums of ``plan``, and the cost of each in the other forms."""
    names = {0: "all pairs", 1: "pairs of one image", 2: "pairs of one position"}
    coefficients, rows, positions = problem[:3]
    sizes = problem[3:]
    counts = ((rows, 1), (positions, rows // positions), (rows // positions, positions))
    computed = []
    for place, (form, (length, count)) in enumerate(zip(plan, counts, strict=True)):
        if not coefficients[place]:
            continue
        forms = candidates(place == 0 and target == "cpu", problem.grad_teacher)
        costs = {candidate: multiply_adds(candidate, length, *sizes) for candidate in forms}
        computed.append(Sum(names[place], length, count, form, costs))
        if place == 0 and form == GRAM:
            break  # its tiles have every pair, and the other sums are weights on them
    return computed
