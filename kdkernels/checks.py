"""Argument checks of the operators. Each error names the argument, what was expected and what it got."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .dtensor import is_dtensor

LARGEST = sys.float_info.max  # torch.compile has no answer to comparisons with -infinity
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def tensor(name: str, value: object, dim: int | None, shape: str) -> Tensor:
    """Check a tensor with ``dim`` dimensions. None stands for at least 2 dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if is_dtensor(value):
        placements = getattr(value, "placements", ())
        raise TypeError(
            f"{name} must be a plain tensor, got a DTensor with placements {placements}: pass "
            f"{name}.full_tensor(), or where samples are sharded {name}.to_local() and group= where the loss takes it"
        )
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
    """Check two networks' logits for the same samples and classes."""
    student = tensor("student_logits", student, 2, "b x K")
    teacher = tensor("teacher_logits", teacher, 2, "b x K")
    same_batch("teacher_logits", teacher, "student_logits", student)
    same_device("teacher_logits", teacher, "student_logits", student)
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(f"teacher_logits must have student_logits' {student.shape[1]} classes, got {teacher.shape[1]}")
    return student, teacher


def rows_of_logits(student: object, teacher: object, mask: object) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check two networks' logits ``... x K`` and a mask of their leading dimensions. Return rows, N x K and N."""
    student = tensor("student_logits", student, None, "... x K")
    teacher = tensor("teacher_logits", teacher, None, "... x K")
    same_device("teacher_logits", teacher, "student_logits", student)
    if student.shape != teacher.shape:
        raise ValueError(
            f"teacher_logits must have student_logits' shape {tuple(student.shape)}, got {tuple(teacher.shape)}"
        )
    if mask is not None:
        mask = bools("mask", mask, student.shape[:-1], student).flatten()
    return _rows(student), _rows(teacher), mask


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.flatten(0, -2)


def bools(name: str, value: object, shape: Sequence[int], logits: Tensor) -> Tensor:
    """Check a mask, which is True where something counts."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a bool tensor, got {type(value).__name__}")
    if value.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor, which is True where logits count, got {value.dtype}")
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}")
    if value.device != logits.device:
        raise ValueError(f"{name} must be on the logits' device {logits.device}, got {value.device}")
    return value


def class_indices(
    value: object, logits: Tensor, shape: Sequence[int], ignore_index: int, mask: Tensor | None
) -> Tensor:
    """Check a class index for each row of the logits N x K, int64. Return them flat.

    Rows outside of the mask get ``ignore_index``. Values are only checked on the CPU, because a check on a GPU would
    wait for the device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(value).__name__}")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"labels must be integer class indices, got {value.dtype}")
    if value.shape != shape:
        raise ValueError(f"labels must have shape {tuple(shape)}, got {tuple(value.shape)}")
    if value.device != logits.device:
        raise ValueError(f"labels must be on the logits' device {logits.device}, got {value.device}")
    indices = value.flatten().long()
    if mask is not None:
        indices = indices.masked_fill(~mask, ignore_index)
    if readable(indices):
        _check_range(indices, logits.shape[1], ignore_index)
    return indices


def _check_range(indices: Tensor, classes: int, ignore_index: int) -> None:
    smallest, largest = (extreme.item() for extreme in indices.aminmax())
    if smallest >= 0 and largest < classes:
        return
    wrong = indices[(indices != ignore_index) & ((indices < 0) | (indices >= classes))]
    if len(wrong):
        raise ValueError(
            f"labels must be class indices from 0 to {classes - 1}, or ignore_index={ignore_index}, "
            f"got {wrong[0].item()}"
        )


def readable(value: Tensor) -> bool:
    """Return whether the values of a tensor can be read now: on the CPU, and not while PyTorch traces a program."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return value.device.type == "cpu" and type(value) is Tensor and not traced


def labels(value: object, logits: Tensor) -> Tensor:
    """Check the class index of each sample, int64."""
    if not isinstance(value, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(value).__name__}")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"labels must be integer class indices, got {value.dtype}")
    if value.shape != logits.shape[:1]:
        raise ValueError(f"labels must have shape ({logits.shape[0]},), got {tuple(value.shape)}")
    if value.device != logits.device:
        raise ValueError(f"labels must be on the logits' device {logits.device}, got {value.device}")
    return value.long()


def logits_along(student: object, teacher: object, dim: object, indices: object) -> None:
    """Check two networks' logits of any equal shape, with the classes in ``dim``.

    With the classes' ``indices``, the teacher has as many numbers in ``dim`` as the indices have.
    """
    student = tensor("student_logits", student, None, "... x K")
    teacher = tensor("teacher_logits", teacher, None, "... x K")
    same_device("teacher_logits", teacher, "student_logits", student)
    dim = dimension("dim", dim, student)
    if indices is None:
        if student.dim() == teacher.dim() and _without(student, dim) == _without(teacher, dim):
            if student.shape[dim] != teacher.shape[dim]:
                raise ValueError(
                    f"teacher_logits must have student_logits' {student.shape[dim]} classes, got {teacher.shape[dim]}"
                )
        elif student.dim() == 2 == teacher.dim() and dim == 1:
            same_batch("teacher_logits", teacher, "student_logits", student)
        if student.shape != teacher.shape:
            raise ValueError(
                f"teacher_logits must have student_logits' shape {tuple(student.shape)}, got {tuple(teacher.shape)}"
            )
        return
    if not isinstance(indices, Tensor):
        raise TypeError(f"teacher_indices must be a tensor, got {type(indices).__name__}")
    if indices.dtype != torch.int64:
        raise TypeError(f"teacher_indices must be int64, got {indices.dtype}")
    same_device("teacher_indices", indices, "student_logits", student)
    expected = (*student.shape[:dim], "k", *student.shape[dim + 1 :])
    if indices.dim() != student.dim() or _without(indices, dim) != _without(student, dim):
        wanted = ", ".join(map(str, expected))
        raise ValueError(f"teacher_indices must have shape ({wanted}), got {tuple(indices.shape)}")
    if teacher.shape != indices.shape:
        raise ValueError(
            f"teacher_logits must have teacher_indices' shape {tuple(indices.shape)}, got {tuple(teacher.shape)}"
        )
    classes = student.shape[dim]
    if indices.shape[dim] > classes:
        raise ValueError(
            f"teacher_indices must hold at most student_logits' {classes} classes, got {indices.shape[dim]} in a row"
        )
    if readable(indices):
        _in_range("teacher_indices", indices, classes)
        ordered = indices.sort(dim).values
        if (ordered.diff(dim=dim) == 0).any():
            raise ValueError("teacher_indices must not repeat a class in a row, got the same class twice")
        if (teacher.detach().double().exp().sum(dim) > 1.05).any():
            raise ValueError(
                "teacher_logits must hold log-probabilities with teacher_indices, got a row whose probabilities add up"
                " to more than 1; pass logits.log_softmax(dim) of all classes at the loss's temperature, gathered"
            )


def dimension(name: str, value: object, of: Tensor) -> int:
    """Check the index of a dimension; the result is not negative."""
    number = integer(name, value)
    if not -of.dim() <= number < of.dim():
        raise ValueError(
            f"{name} must be in [{-of.dim()}, {of.dim() - 1}] for logits of shape {tuple(of.shape)}, got {number}"
        )
    return number % of.dim()


def row_mask(value: object, logits: Tensor, dim: int) -> Tensor:
    """Check which rows of logits count. The result has the shape of the rows."""
    if not isinstance(value, Tensor):
        raise TypeError(f"mask must be a tensor, got {type(value).__name__}")
    if value.dtype != torch.bool:
        raise TypeError(f"mask must be bool, True for rows that count, got {value.dtype}")
    return per_row("mask", value, logits, dim)


def row_labels(value: object, logits: Tensor, dim: int, ignore_index: int) -> Tensor:
    """Check the class index of each row of logits."""
    shape = _without(logits, dim)
    if not isinstance(value, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(value).__name__}")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"labels must be integer class indices, got {value.dtype}")
    if value.shape != shape:
        raise ValueError(f"labels must have shape {tuple(shape)}, got {tuple(value.shape)}")
    same_device("labels", value, "student_logits", logits)
    if readable(value):
        _in_range("labels", value[value != ignore_index], logits.shape[dim], f" or ignore_index={ignore_index}")
    return value


def temperature(value: Tensor, logits: Tensor, dim: int) -> Tensor:
    """Check one temperature, or the temperature of each row of logits. The result broadcasts to the rows' shape."""
    if not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool and value.dim() == 0:
        value = value.to(torch.float32)
    if value.dtype not in FLOATS:
        raise TypeError(f"temperature must be a number or a tensor of floating-point numbers, got {value.dtype}")
    if value.dim() == 0 and value.device.type == "cpu" and logits.device.type != "cpu":
        value = value.to(logits.device)
    value = value if value.numel() == 1 and value.dim() == 0 else per_row("temperature", value, logits, dim)
    if readable(value) and ((value <= 0) | (value == math.inf)).any():
        raise ValueError(f"temperature must be a positive number in every row, got {value.min().item():g}")
    return value


def per_row(name: str, value: Tensor, logits: Tensor, dim: int) -> Tensor:
    """Expand one number per row to the shape of the rows of logits, ``logits.shape`` without ``dim``.

    A tensor that also has a dimension of size 1 for the classes is taken as well.
    """
    shape = _without(logits, dim)
    same_device(name, value, "student_logits", logits)
    given = value.squeeze(dim) if value.dim() == logits.dim() and value.shape[dim] == 1 else value
    if given.dim() > len(shape) or any(
        size not in (1, wanted) for size, wanted in zip(reversed(given.shape), reversed(shape), strict=False)
    ):
        raise ValueError(f"{name} must broadcast to the rows' shape {tuple(shape)}, got {tuple(value.shape)}")
    return given.expand(shape)


def _in_range(name: str, value: Tensor, classes: int, otherwise: str = "") -> None:
    outside = (value < 0) | (value >= classes)
    if outside.any():
        raise ValueError(f"{name} must be in [0, {classes - 1}]{otherwise}, got {value[outside][0].item()}")


def _without(x: Tensor, dim: int) -> torch.Size:
    return x.shape[:dim] + x.shape[dim + 1 :]


def sample_mask(value: object, other_name: str, other: Tensor) -> None:
    """Check a mask of the samples of ``other``. None is no mask."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"mask must be a tensor of bools, got {type(value).__name__}; use torch.tensor(mask)")
    if is_dtensor(value):
        raise TypeError(f"mask must be a plain tensor, as {other_name} is, got a DTensor; pass mask.to_local()")
    if value.dtype != torch.bool:
        raise TypeError(f"mask must be bool, True for a sample that counts, got {value.dtype}; use mask.bool()")
    if value.shape != other.shape[:1]:
        raise ValueError(
            f"mask must have shape ({other.shape[0]},), one bool for each sample of {other_name}, "
            f"got {tuple(value.shape)}"
        )
    same_device("mask", value, other_name, other)


def maps(student: object, teacher: object) -> tuple[Tensor, Tensor]:
    """Check two networks' feature maps of the same samples, with the same channels."""
    student = tensor("student", student, 4, "b x c x h x w")
    teacher = tensor("teacher", teacher, 4, "b x c x h x w")
    same_batch("teacher", teacher, "student", student)
    same_device("teacher", teacher, "student", student)
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(f"teacher must have student's {student.shape[1]} channels, got {teacher.shape[1]}")
    return student, teacher


def embeddings(student: object, teacher: object) -> tuple[Tensor, Tensor]:
    """Check two networks' embeddings of the same samples, of any widths."""
    student = tensor("student", student, 2, "b x d")
    teacher = tensor("teacher", teacher, 2, "b x d'")
    same_batch("teacher", teacher, "student", student)
    same_device("teacher", teacher, "student", student)
    return student, teacher


def one_of(name: str, value: str, options: Sequence[str]) -> None:
    if value not in options:
        raise ValueError(f"{name} must be one of {tuple(options)}, got {value!r}")


def positive(name: str, value: object) -> float:
    number = _number(value)
    if not (holds(number > 0) and holds(number < math.inf)):
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    return number


def non_negative(name: str, value: object) -> float:
    number = _number(value)
    if not (holds(number >= 0) and holds(number < math.inf)):
        raise ValueError(f"{name} must be a number >= 0, got {value!r}")
    return number


def fraction(name: str, value: object) -> float:
    number = _number(value)
    if not (holds(number >= 0) and holds(number <= 1)):
        raise ValueError(f"{name} must be a number in [0, 1], got {value!r}")
    return number


def index(name: str, value: object) -> int:
    number = _integer(value)
    if number is None:
        raise ValueError(f"{name} must be an integer, got {value!r}")
    return number


def finite(name: str, value: object) -> float:
    number = _number(value)
    if not is_finite(number):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return number


def positive_int(name: str, value: object) -> int:
    number = _integer(value)
    if number is None or number < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return number


def non_negative_int(name: str, value: object) -> int:
    number = _integer(value)
    if number is None or number < 0:
        raise ValueError(f"{name} must be an integer >= 0, got {value!r}")
    return number


def integer(name: str, value: object) -> int:
    number = _integer(value)
    if number is None:
        raise ValueError(f"{name} must be an integer, got {value!r}")
    return number


def is_finite(number: float) -> bool:
    return holds(number >= -LARGEST) and holds(number <= LARGEST)


def holds(condition: bool) -> bool:
    """Return a condition, or True if torch.compile cannot know it.

    NumPy's numbers are tensors in a compiled function, so their values are unknown. Kernels check them when they run.
    """
    if not torch.compiler.is_dynamo_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_true  # its module takes long to import

    return guard_or_true(condition)


def _number(value: Any) -> float:
    """Return the value as a Python number by ``float()``, or NaN if it is not a number.

    A symbolic number of torch.compile and torch.export is returned unchanged.
    """
    if type(value) in (float, int) or isinstance(value, (torch.SymFloat, torch.SymInt)):
        return cast(float, value)
    # float() would accept text, and detach a tensor that requires grad.
    if isinstance(value, (str, bytes)) or (isinstance(value, Tensor) and value.requires_grad):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return math.nan


def _integer(value: Any) -> int | None:
    """Return the value as a Python integer by ``operator.index()``. Return None if it is not an integer, or if it is a
    bool.
    """
    if type(value) is int or isinstance(value, torch.SymInt):
        return cast(int, value)
    if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        return None
