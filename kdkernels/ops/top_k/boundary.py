"""What ``top_k`` and ``top_k_backward`` expect of their arguments."""

from __future__ import annotations

from torch import Tensor

from ...boundary import FULL_FLOATS, LABELS, Check


def check_top_k(student: Tensor, indices: Tensor, temperatures: Tensor) -> None:
    _check_chosen(Check("top_k"), student, indices, temperatures)


def check_top_k_backward(grad_exponents: Tensor, student: Tensor, indices: Tensor, temperatures: Tensor) -> None:
    check = Check("top_k_backward")
    _check_chosen(check, student, indices, temperatures)
    check.bind("width", indices.shape[1] + 1)
    check.tensor("grad_exponents", grad_exponents, "N width", FULL_FLOATS)
    check.compute_type("grad_exponents", grad_exponents, "student", student)


def _check_chosen(check: Check, student: Tensor, indices: Tensor, temperatures: Tensor) -> None:
    check.tensor("student", student, "N K")
    check.tensor("indices", indices, "N k", LABELS)
    check.tensor("temperatures", temperatures, "N", FULL_FLOATS)
    columns, classes = indices.shape[1], student.shape[1]
    check.require(columns <= classes, lambda: f"indices must have at most {classes} columns, got {columns}")
