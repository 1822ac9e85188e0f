"""Compare two correlation structures: sums of (x_r·x_s − y_r·y_s)² over pairs of rows, without the N x N matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends, checks, native
from ..autograd import scaled
from . import reference
from .plan import FORMS, GRAM, Coefficients, Plan, make_plan


def congruence(
    x: Tensor,
    y: Tensor,
    *,
    positions: int = 1,
    coefficients: tuple[float, float, float, float] = (1.0, 0.0, 0.0, 0.0),
    form: str = "auto",
    backend: str = "auto",
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
        backend: "auto", "reference", "native" or "triton".

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
    plan = plan_for(x, y, positions, coefficients, form)
    run = {"reference": _reference, "native": _native, "triton": _triton}[backends.choose(backend, x)]
    return run(x, y, positions, coefficients, plan)


def plan_for(x: Tensor, y: Tensor, positions: int, coefficients: Coefficients, form: str) -> Plan:
    grads = (torch.is_grad_enabled() and rows.requires_grad for rows in (x, y))
    return make_plan(form, coefficients, x.shape[0], positions, x.shape[1], y.shape[1], *grads)


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


def _reference(x: Tensor, y: Tensor, positions: int, coefficients: Coefficients, plan: Plan) -> Tensor:
    run = reference.gram_form if plan.full == GRAM else reference.feature_form
    # Autocast would run the products in half precision.
    with torch.autocast(x.device.type, enabled=False):
        return run(x, y, positions, coefficients)


def _triton(x: Tensor, y: Tensor, positions: int, coefficients: Coefficients, plan: Plan) -> Tensor:
    from .triton import congruence as run

    return run(x, y, positions, coefficients, plan)


def _native(x: Tensor, y: Tensor, positions: int, coefficients: Coefficients, plan: Plan) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
        return _Native.apply(x, y, positions, coefficients, plan)[0]
    return native.ops.congruence(x, y, positions, coefficients, plan.codes, False, False, native.allows_tf32())[0]


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, positions, coefficients, plan):
        want_x, want_y, *_ = ctx.needs_input_grad
        settings = positions, coefficients, plan.codes, want_x, want_y, native.allows_tf32()
        loss, grad_x, grad_y = native.ops.congruence(x, y, *settings)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_x, grad_y)
        return loss, grad_x, grad_y

    @staticmethod
    def backward(ctx, grad_loss, *_):
        grads = (
            scaled(grad_loss, grad, grad.dtype) if want else None
            for grad, want in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        )
        return *grads, None, None, None
