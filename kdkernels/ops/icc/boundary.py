"""What ``icc_map``, ``icc_map_backward`` and ``icc_loss`` expect of their arguments."""

from __future__ import annotations

from torch import Tensor

from ...boundary import Check


def check_icc_map(logits: Tensor) -> None:
    _logits(Check("icc_map"), "logits", logits)


def check_icc_map_backward(grad_map: Tensor, logits: Tensor) -> None:
    check = Check("icc_map_backward")
    _logits(check, "logits", logits)
    check.tensor("grad_map", grad_map, "K K")
    check.compute_type("grad_map", grad_map, "logits", logits)


def check_icc_loss(student: Tensor, teacher: Tensor, scale: float) -> None:
    check = Check("icc_loss")
    _logits(check, "student", student)
    check.tensor("teacher", teacher, "b K")
    check.finite("scale", scale)


def _logits(check: Check, name: str, logits: Tensor) -> None:
    check.tensor(name, logits, "b K")
    samples, classes = logits.shape
    check.fits(name, classes, classes)
    check.fits_gpu(name, "samples", samples)
    check.fits_gpu(name, "classes", classes)
