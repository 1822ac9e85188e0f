"""Losses that the methods are trained beside or compared with."""

from __future__ import annotations

from torch import Tensor

from ..ops.kd import kd

__all__ = ["kd_loss"]


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    scale: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Knowledge distillation (LKD Eq. 1): batch mean of KL(softmax(teacher / T) ‖ softmax(student / T)).

    Args:
        student_logits: b x K.
        teacher_logits: b x K; receives a gradient only if it requires one.
        temperature: T > 0.
        scale: multiply by T², which keeps the gradient's size independent of T.
        backend: "auto", "reference", "native" or "triton".

    Returns:
        A scalar: float64 if either input is, else float32.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what it got.
        RuntimeError: when a backend asked for by name cannot run.

    Memory: the gradient, b x K.
    """
    return kd(student_logits, teacher_logits, temperature=temperature, scale=scale, backend=backend)
