"""How results are compared. The tolerances of the whole suite are here."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kdkernels import native

FLOAT32_TOLERANCE = 1e-5
FLOAT64_TOLERANCE = 1e-12
HALF_DTYPES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALF_DTYPES)

needs_every_library = pytest.mark.skipif(
    sum(path.name.startswith("_native_cpu_") for path in native.built()) == 1,
    reason="KDKERNELS_CPU_ISAS had the native library built for one instruction set only",
)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64; the plain norm where nothing is expected."""
    assert actual.shape == expected.shape, f"got shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    scale = expected.norm().item()
    return (actual - expected).norm().item() / (scale or 1.0)


def assert_close(actual: Tensor, expected: Tensor, what: str = "result") -> None:
    """A float32 or float64 result equals the exact one within its dtype's tolerance."""
    tolerance = FLOAT64_TOLERANCE if actual.dtype == torch.float64 else FLOAT32_TOLERANCE
    _assert_error(relative_error(actual, expected), tolerance, what)


def assert_as_good_as(actual: Tensor, eager: Tensor, expected: Tensor, what: str = "result") -> None:
    """A result from half-precision inputs is at most twice as wrong as that of eager code on inputs cast to float32."""
    _assert_error(relative_error(actual, expected), max(2 * relative_error(eager, expected), FLOAT32_TOLERANCE), what)


def assert_gradients(
    leaves: Iterable[Tensor], gradients: Iterable[Tensor | None], exact: Iterable[Tensor | None]
) -> None:
    """Every gradient has its leaf's dtype and is as exact as that allows; the same ones are missing."""
    for leaf, gradient, correct in zip(leaves, gradients, exact, strict=True):
        assert (gradient is None) == (correct is None)
        if gradient is None:
            continue
        assert gradient.dtype == leaf.dtype
        if leaf.dtype in HALF_DTYPES:
            assert_as_good_as(gradient, correct.to(leaf.dtype), correct, "gradient")
        else:
            assert_close(gradient, correct, "gradient")


def assert_matches(fused: Callable[..., Tensor], definition: Callable[..., Tensor], *inputs: Tensor) -> None:
    """The loss of ``fused`` and its gradients are those of ``definition`` in float64, and have the right dtypes.

    Where a result is a small difference of large terms, by the chance of a draw, no float32 code has it within the
    tolerance. There it is right if it is at most four times as wrong as the definition in the loss's own dtype, at
    inputs that differ by an ulp.
    """
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in inputs), torch.float32)
    dtypes = (dtype, *(x.dtype for x in inputs))
    results, exact = results_of(fused, *inputs), results_of(definition, *exactly(*inputs))
    for i, (result, correct, wanted) in enumerate(zip(results, exact, dtypes, strict=True)):
        assert (result is None) == (correct is None)
        if result is None:
            continue
        assert result.dtype == wanted
        error, tolerance = relative_error(result, correct), FLOAT64_TOLERANCE
        if wanted != torch.float64:
            tolerance = max(FLOAT32_TOLERANCE, 2 * relative_error(correct.to(wanted), correct))
        if not error <= tolerance:
            nearby = (results_of(definition, *_nearby(dtype, inputs))[i].to(wanted) for _ in range(16))
            errors = (relative_error(value, correct) for value in nearby)
            tolerance = max(tolerance, *(4 * x for x in errors if math.isfinite(x)))
        _assert_error(error, tolerance, f"gradient to input {i}" if i else "loss")


def _nearby(dtype: torch.dtype, inputs: Iterable[Tensor]) -> list[Tensor]:
    """Each of the numbers in ``dtype``, an ulp larger, smaller, or as it is; what was equal remains so."""
    result = []
    for x in inputs:
        values, places = x.detach().to(dtype).unique(return_inverse=True)
        ulps = torch.randint(-1, 2, values.shape, device=x.device) * torch.finfo(dtype).eps
        result.append((values + values * ulps)[places].requires_grad_(x.requires_grad))
    return result


def _assert_error(error: float, tolerance: float, what: str) -> None:
    assert error <= tolerance, f"{what}: relative error {error:.2e}, allowed {tolerance:.2e}"


def results_of(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor | None]:
    loss, gradients = loss_and_gradients(function, *inputs)
    return [loss, *gradients]


def loss_and_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """The loss at leaves with the data, strides and requires_grad of ``inputs``, and each one's gradient or None."""
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
    loss = function(*leaves)
    loss.backward()
    return loss.detach(), [x.grad for x in leaves]


def as_tf32(x: Tensor) -> Tensor:
    """Rounded to the 11 significant bits of tf32, halves away from zero; in float64."""
    significand, exponent = torch.frexp(x.detach().double())
    return torch.ldexp(significand.sign() * (significand.abs() * 2**11 + 0.5).floor(), exponent - 11)


def exactly(*inputs: Tensor) -> list[Tensor]:
    """The same values in float64, for the exact result."""
    return [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]


def peak_growth(step: Callable[[], object]) -> int:
    """Bytes by which this process grows, at its peak, while ``step`` runs. Call it in a child process."""

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = status("VmRSS")
    step()
    return status("VmHWM") - before
