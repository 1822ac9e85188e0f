"""Compare two correlation structures: sums of (x_r·x_s − y_r·y_s)² over pairs of rows, without the N x N matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import checks
from ...types import FORMS, Backend, FormName
from ..autograd import needs_gradient
from ..operator import Operator
from ..tuning import LARGE_GRAM
from . import fake, reference
from .plan import GRAM, Coefficients, Problem, known, make_plans, planned_when_it_runs, size_of, target_of

CONGRUENCE = Operator(
    "congruence",
    kernels=(fake.congruence,),
    large=LARGE_GRAM,
    memory="a gradient, N x d_S, twice; min(N, 512)·N (Gram form) or the largest d x d sum (feature form)",
    over_ranks="the d x d sums (feature form), or twice all ranks' rows (Gram form)",
)


def congruence(
    x: Tensor,
    y: Tensor,
    *,
    positions: int = 1,
    coefficients: tuple[float, float, float, float] = (1.0, 0.0, 0.0, 0.0),
    form: FormName = "auto",
    backend: Backend = "auto",
) -> Tensor:
    """Sum the squared differences of two dot-product structures.

    With ``D = X Xᵀ − Y Yᵀ`` and row ``r`` belonging to image ``r // positions`` and position ``r % positions``, the
    result is ``full·ΣD² + intra·ΣD²[same image] + inter_same·ΣD²[same position] + diagonal·Σ D_rr²``.

    Args:
        x: N x d_S student rows, float32 or float64.
        y: N x d_T teacher rows of the same dtype.
        positions: rows per image; it divides N.
        coefficients: (full, intra, inter_same, diagonal).
        form: "gram" compares N x N tiles and drops them; "feature" uses ‖XᵀX‖² + ‖YᵀY‖² − 2‖YᵀX‖²; "auto" takes the
            cheaper form of each term.
        backend: "auto", "reference", "native", "triton" or "library".

    Returns:
        A scalar, differentiable in x and y.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what it got.
        RuntimeError: when a backend asked for by name cannot run.
    """
    check(x, y, positions, form)
    if len(coefficients) != len(Coefficients._fields):
        raise ValueError(f"coefficients must be the four of {Coefficients._fields}, got {coefficients!r}")
    coefficients = Coefficients(*map(float, coefficients))
    chosen = CONGRUENCE.choose(backend, x, size=lambda: size_of(form, problem_of(x, y, positions, coefficients)))
    codes = []
    if not planned_when_it_runs(form, chosen):
        problem = problem_of(x, y, positions, coefficients)
        codes = make_plans(form, (problem,), target_of(chosen, x))[0].codes
    return CONGRUENCE.loss(chosen, (x, y), (positions, coefficients, codes), _reference)


def _with_plan(arguments: list[Any], backend: str) -> list[Any]:
    """Return the arguments of the kernel, with the plan if it was left open."""
    x, y, positions, coefficients, codes, grad_x, grad_y, *tf32 = arguments
    if not codes:
        sizes = x.shape[0], positions, x.shape[1], y.shape[1]
        problem = Problem(Coefficients(*coefficients), *sizes, grad_x, grad_y)
        codes = make_plans("auto", (problem,), target_of(backend, x))[0].codes
    return [x, y, positions, coefficients, codes, grad_x, grad_y, *tf32]


fake.congruence.completed = _with_plan


def problem_of(x: Tensor, y: Tensor, positions: int, coefficients: Coefficients) -> Problem:
    sizes = known(x.shape[0]), positions, known(x.shape[1]), known(y.shape[1])
    return Problem(coefficients, *sizes, needs_gradient(x), needs_gradient(y))


def check(x: object, y: object, positions: int, form: str) -> None:
    x = checks.tensor("x", x, 2, "N x d_S")
    y = checks.tensor("y", y, 2, "N x d_T")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x must be float32 or float64, got {x.dtype}")
    if y.dtype != x.dtype:
        raise TypeError(f"y must have x's dtype {x.dtype}, got {y.dtype}")
    checks.same_batch("y", y, "x", x)
    checks.same_device("y", y, "x", x)
    checks.one_of("form", form, FORMS)
    checks.positive_int("positions", positions)
    if x.shape[0] % positions:
        raise ValueError(f"positions must divide the number of rows {x.shape[0]}, got {positions}")


def _reference(x: Tensor, y: Tensor, positions: int, coefficients: Coefficients, plan: list[int]) -> Tensor:
    run = reference.gram_form if plan[0] == GRAM.code else reference.feature_form
    return run(x, y, positions, coefficients)
