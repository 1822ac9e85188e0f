"""Check the arguments of registered operators that are called without this package's Python functions.

``csrc/checks/check.h`` does the same for the native operators, in the same words. ``torch.compile`` and
``torch.export`` call the fakes, so they fail as the operator would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

FULL_FLOATS = (torch.float32, torch.float64)
FLOATS = (*FULL_FLOATS, torch.bfloat16, torch.float16)
LABELS = (torch.int64,)
MASK = (torch.bool,)
EXPECTED = {
    FLOATS: "float32, float64, bfloat16 or float16",
    FULL_FLOATS: "float32 or float64",
    LABELS: "int64",
    MASK: "bool",
}
NAMED = (
    *FLOATS,
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128),
)
# The largest allocation of a kernel, in elements of 8 bytes. Its bytes do not overflow int64.
MOST_ELEMENTS = 2**60
# The CUDA kernels count the elements of a row in int, and add up to 4096 to this number.
MOST_ON_GPU = 2**31 - 1 - 4096


class Check:
    """The checks of one call. Each raises ``RuntimeError`` with the operator, the argument, what it expected and what
    it got.
    """

    def __init__(self, op: str) -> None:
        self._op = op
        self._sizes: dict[str, int] = {}
        self._first: tuple[str, torch.device] | None = None

    def tensor(self, name: str, tensor: Tensor, shape: str, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
        """Check a tensor. ``shape`` is the shape in the docstrings, for example "b K".

        A name has one size in all tensors of the operator. A number is itself. "..." is one or more further dimensions.
        The tensor is not empty, and is on the device of the first tensor.
        """
        self._place(name, tensor)
        if tensor.dtype not in dtypes:
            self.fail(f"{name} must be {EXPECTED[dtypes]}, got {_dtype(tensor)}")
        words = shape.split()
        wanted = words[:-1] if words[-1:] == ["..."] else words
        if tensor.dim() < len(words) if wanted != words else tensor.dim() != len(words):
            self.fail(_shape_message(name, tensor, words, self._sizes))
        for size in tensor.shape:
            self.require(size > 0, lambda: f"{name} must not be empty, got shape {_sizes(tensor.shape)}")
        if _product(tensor.shape) > MOST_ELEMENTS:
            self.fail(f"{name} must have at most 2^60 elements, got shape {_sizes(tensor.shape)}")
        known = self._sizes
        self._sizes = known.copy()
        for word, size in zip(wanted, tensor.shape, strict=False):
            length = int(word) if word.isdigit() else self._sizes.setdefault(word, size)
            self.require(size == length, lambda: _shape_message(name, tensor, words, known))

    def unwanted(self, name: str, gradient: Tensor) -> bool:
        """Return whether a gradient is not wanted. Then it has the shape (0), on the device of the first tensor."""
        self._place(name, gradient)
        return gradient.dim() == 1 and isinstance(gradient.shape[0], int) and gradient.shape[0] == 0

    def same_type(self, name: str, tensor: Tensor, other: str, of: Tensor) -> None:
        if tensor.dtype != of.dtype:
            self.fail(f"{name} must have {other}'s type {_dtype(of)}, got {_dtype(tensor)}")

    def compute_type(self, name: str, tensor: Tensor, other: str, of: Tensor) -> None:
        """Check that a tensor has another one's compute type: float64 for float64, and float32 for all other types."""
        expected = torch.float64 if of.dtype == torch.float64 else torch.float32
        if tensor.dtype != expected:
            self.fail(f"{name} must have {other}'s compute type {_dtype_name(expected)}, got {_dtype(tensor)}")

    def bind(self, name: str, size: int) -> None:
        self._sizes[name] = size

    def forget(self, keep: int = 0) -> None:
        """Forget all names except the first ones."""
        self._sizes = dict(list(self._sizes.items())[:keep])

    @property
    def on_gpu(self) -> bool:
        return self._first is not None and self._first[1].type == "cuda"

    def fits(self, name: str, *sizes: int) -> None:
        """Check the number of elements of a result or a buffer."""
        if _product(sizes) > MOST_ELEMENTS:
            self.fail(f"{name} must have sizes whose product is at most 2^60, got {_sizes(sizes)}")

    def fits_gpu(self, name: str, what: str, *sizes: int) -> None:
        if self.on_gpu and _product(sizes) > MOST_ON_GPU:
            self.fail(f"{name} must have at most {MOST_ON_GPU} {what} on a GPU, got {_product(sizes)}")

    def positive_int(self, name: str, value: int) -> None:
        self.require(value >= 1, lambda: f"{name} must be a positive integer, got {value}")

    def non_negative_int(self, name: str, value: int) -> None:
        self.require(value >= 0, lambda: f"{name} must be an integer >= 0, got {value}")

    def positive(self, name: str, value: float) -> None:
        if not 0 < value < math.inf:
            self.fail(f"{name} must be a positive number, got {value:g}")

    def non_negative(self, name: str, value: float) -> None:
        if not 0 <= value < math.inf:
            self.fail(f"{name} must be a number >= 0, got {value:g}")

    def finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            self.fail(f"{name} must be a finite number, got {value:g}")

    def holds(self, name: str, values: Sequence[object], count: int, what: str) -> None:
        if len(values) != count:
            self.fail(f"{name} must hold {count} {what}, got {len(values)}")

    def not_empty(self, name: str, values: Sequence[object]) -> None:
        if not values:
            self.fail(f"{name} must hold at least one entry, got none")

    def all_finite(self, name: str, values: Sequence[float], count: int, what: str) -> None:
        self.holds(name, values, count, what)
        for i, value in enumerate(values):
            self.finite(f"{name}[{i}]", value)

    def flag(self, name: str, value: int) -> None:
        if value not in (0, 1):
            self.fail(f"{name} must be 0 or 1, got {value}")

    def flags(self, name: str, values: Sequence[int], count: int) -> None:
        self.holds(name, values, count, "flags")
        for i, value in enumerate(values):
            self.flag(f"{name}[{i}]", value)

    def plan(self, name: str, codes: Sequence[int], first: int, grad_teacher: bool) -> None:
        """Check three form codes of ``ops/congruence/plan.py`` from entry ``first`` on.

        The mixed form is only for the sum over all pairs, without a gradient to the teacher.
        """
        for i in range(first, first + 3):
            if codes[i] in (0, 7):
                continue
            if i > first:
                self.fail(f"{name}[{i}] must be 0 (gram) or 7 (feature), got {codes[i]}")
            if codes[i] != 1:
                self.fail(f"{name}[{i}] must be 0 (gram), 1 (mixed) or 7 (feature), got {codes[i]}")
            if self.on_gpu:
                self.fail(f"{name}[{i}] must be 0 (gram) or 7 (feature) on a GPU, got 1")
            if grad_teacher:
                self.fail(f"{name}[{i}] must be 0 (gram) or 7 (feature) for the second gradient, got 1")

    def require(self, condition: bool, message: Callable[[], str]) -> None:
        """Raise unless a condition on sizes holds. ``torch.compile`` and ``torch.export`` guard on unknown sizes."""
        torch._check(condition, lambda: f"{self._op}: {message()}")

    def fail(self, message: str) -> NoReturn:
        raise RuntimeError(f"{self._op}: {message}")

    def _place(self, name: str, tensor: Tensor) -> None:
        """Check a dense tensor on the device of the first tensor."""
        if not isinstance(tensor, Tensor):
            self.fail(f"{name} must be a tensor, got None")
        if tensor.layout != torch.strided:
            self.fail(f"{name} must be a dense tensor, got a sparse one")
        if self._first is None:
            self._first = name, tensor.device
        elif tensor.device != self._first[1]:
            other, device = self._first
            self.fail(f"{name} must be on {other}'s device {device}, got {tensor.device}")


def _shape_message(name: str, tensor: Tensor, words: Sequence[str], known: dict[str, int]) -> str:
    expected = [known.get(word, word) for word in words]
    return f"{name} must have shape {_sizes(expected)}, got {_sizes(tensor.shape)}"


def _sizes(sizes: Sequence[object]) -> str:
    """Return sizes as Python prints a tuple of numbers."""
    return f"({', '.join(map(str, sizes))}{',' if len(sizes) == 1 else ''})"


def _dtype(tensor: Tensor) -> str:
    return _dtype_name(tensor.dtype) if tensor.dtype in NAMED else "another type"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _product(sizes: Sequence[int]) -> int:
    """Return the product of the known sizes, because a limit is no reason to guard on unknown sizes."""
    return math.prod(size for size in sizes if isinstance(size, int))
