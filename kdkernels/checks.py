"""Argument checks shared by the operators: each error names the argument, what it got and what it expected."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def tensor(name: str, value: object, dim: int | None, shape: str) -> Tensor:
    """``dim`` dimensions, or with None any number of at least 2."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {value.dtype}")
    if value.dim() != dim if dim is not None else value.dim() < 2:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    if value.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(value.shape)}")
    return value


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} must be on {other_name}'s device {other.device}, got {value.device}")


def same_batch(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.shape[0] != other.shape[0]:
        raise ValueError(f"{name} must have {other_name}'s batch size {other.shape[0]}, got {value.shape[0]}")


def logits(student: object, teacher: object) -> tuple[Tensor, Tensor]:
    """Two networks' logits for the same samples and classes."""
    student = tensor("student_logits", student, 2, "b x K")
    teacher = tensor("teacher_logits", teacher, 2, "b x K")
    same_batch("teacher_logits", teacher, "student_logits", student)
    same_device("teacher_logits", teacher, "student_logits", student)
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(f"teacher_logits must have student_logits' {student.shape[1]} classes, got {teacher.shape[1]}")
    return student, teacher


def labels(value: object, samples: int) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(value).__name__}")
    if value.dtype not in (torch.int64, torch.uint8):
        raise TypeError(f"labels must be int64 or uint8 class indices, got {value.dtype}")
    if value.shape != (samples,):
        raise ValueError(f"labels must have shape ({samples},), got {tuple(value.shape)}")


def maps(student: object, teacher: object) -> tuple[Tensor, Tensor]:
    """Two networks' feature maps of the same samples, with the same channels."""
    student = tensor("student", student, 4, "b x c x h x w")
    teacher = tensor("teacher", teacher, 4, "b x c x h x w")
    same_batch("teacher", teacher, "student", student)
    same_device("teacher", teacher, "student", student)
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(f"teacher must have student's {student.shape[1]} channels, got {teacher.shape[1]}")
    return student, teacher


def embeddings(student: object, teacher: object) -> tuple[Tensor, Tensor]:
    """Two networks' embeddings of the same samples, of any widths."""
    student = tensor("student", student, 2, "b x d")
    teacher = tensor("teacher", teacher, 2, "b x d'")
    same_batch("teacher", teacher, "student", student)
    same_device("teacher", teacher, "student", student)
    return student, teacher


def one_of(name: str, value: str, options: Sequence[str]) -> None:
    if value not in options:
        raise ValueError(f"{name} must be one of {tuple(options)}, got {value!r}")


def positive(name: str, value: float) -> None:
    if not (isinstance(value, (int, float)) and 0 < value < math.inf):
        raise ValueError(f"{name} must be a positive number, got {value!r}")


def non_negative(name: str, value: float) -> None:
    if not (isinstance(value, (int, float)) and 0 <= value < math.inf):
        raise ValueError(f"{name} must be a number >= 0, got {value!r}")


def fraction(name: str, value: float) -> None:
    if not (isinstance(value, (int, float)) and 0 <= value <= 1):
        raise ValueError(f"{name} must be a number in [0, 1], got {value!r}")


def finite(name: str, value: float) -> None:
    if not (isinstance(value, (int, float)) and -math.inf < value < math.inf):
        raise ValueError(f"{name} must be a finite number, got {value!r}")


def positive_int(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def non_negative_int(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} must be an integer >= 0, got {value!r}")
