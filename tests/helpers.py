"""Comparison of results, with the tolerances of the whole test suite."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kdkernels import native

FLOAT32_TOLERANCE = 1e-5
FLOAT64_TOLERANCE = 1e-12
HALF_DTYPES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALF_DTYPES)

needs_native = pytest.mark.skipif(
    native.why_not(torch.device("cpu")) is not None, reason=str(native.why_not(torch.device("cpu")))
)
needs_every_library = pytest.mark.skipif(
    sum(path.name.startswith("_native_cpu_") for path in native.built()) == 1,
    reason="KDKERNELS_CPU_ISAS had the native library built for one instruction set only",
)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return ‖actual − expected‖ / ‖expected‖ in float64, or the plain norm if expected is 0."""
    assert actual.shape == expected.shape, f"got shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    scale = expected.norm().item()
    return (actual - expected).norm().item() / (scale or 1.0)


def assert_close(actual: Tensor, expected: Tensor, what: str = "result") -> None:
    """Assert that a float32 or float64 result equals the exact one within the tolerance of its dtype."""
    tolerance = FLOAT64_TOLERANCE if actual.dtype == torch.float64 else FLOAT32_TOLERANCE
    _assert_error(relative_error(actual, expected), tolerance, what)


def assert_as_good_as(actual: Tensor, eager: Tensor, expected: Tensor, what: str = "result") -> None:
    """Assert that a half-precision result has at most twice the error of eager code on inputs cast to float32."""
    _assert_error(relative_error(actual, expected), max(2 * relative_error(eager, expected), FLOAT32_TOLERANCE), what)


def assert_gradients(
    leaves: Iterable[Tensor], gradients: Iterable[Tensor | None], exact: Iterable[Tensor | None]
) -> None:
    """Assert that every gradient has the dtype of its leaf and the precision of this dtype, and that the same gradients
    are None.
    """
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
    """Assert that loss and gradients of ``fused`` equal those of ``definition`` in float64, with the right dtypes.

    A random draw may make a result a small difference of large terms, which no float32 code computes within the
    tolerance. Then the error may be at most four times the error of the definition in the loss's dtype, at inputs that
    differ by one ulp.
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
    """Return each number in ``dtype``, one ulp larger, one ulp smaller, or unchanged. Equal numbers stay equal."""
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
    """Return the loss at leaves with the data, strides and requires_grad of ``inputs``, and each gradient or None."""
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
    loss = function(*leaves)
    loss.backward()
    return loss.detach(), [x.grad for x in leaves]


def three_products(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in float64, as the CUDA kernels multiply float32 where PyTorch allows tf32.

    Each number is the sum of two bfloat16, and the product of both lower ones is left out.
    """

    def planes(x: Tensor) -> tuple[Tensor, Tensor]:
        upper = x.detach().bfloat16().float()
        return upper.double(), (x.detach() - upper).bfloat16().double()

    (a, a_low), (b, b_low) = planes(a), planes(b)
    return a @ b + a @ b_low + a_low @ b


def exactly(*inputs: Tensor) -> list[Tensor]:
    """Return the same values in float64, for the exact result."""
    return [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]


def peak_growth(step: Callable[[], object]) -> int:
    """Return by how many bytes this process grows at its peak while ``step`` runs. Call it in a child process."""

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = status("VmRSS")
    step()
    return status("VmHWM") - before


class KernelCalls(TorchDispatchMode):
    """Records the calls of registered kernels in a block: each function with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("kdkernels", "kdkernels_triton", "kdkernels_library"):
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))

    @property
    def names(self) -> list[str]:
        return [function._opname for function, _ in self.calls]
