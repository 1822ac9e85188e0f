"""Knowledge distillation's temperature-softened divergences, in one pass over the logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import checks
from ...types import DIVERGENCES, ROW_REDUCTIONS, Backend, DivergenceName, RowReduction
from ..divergence import divergence as row_divergences
from ..operator import Operator
from ..shapes import accumulation_dtype
from . import fake, reference

# From here on, ``divergence`` is faster on the CPU, because it writes gradients once, in the backward pass.
MANY_CLASSES = 4096

KD = Operator("kd", kernels=(fake.kd,), memory="a gradient, b x K, twice")


def kd(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float, scale: bool, backend: Backend = "auto"
) -> Tensor:
    """Batch mean of KL(softmax(teacher / T) ‖ softmax(student / T)), times T² if asked; see ``kdkernels.kd_loss``."""
    checks.logits(student_logits, teacher_logits)
    temperature = checks.positive("temperature", temperature)
    settings = temperature, temperature**2 if scale else 1.0
    chosen = KD.choose(backend, student_logits)
    return KD.loss(chosen, (student_logits, teacher_logits), settings, reference.kd)


def is_plain(student_logits: object, temperature: object, dim: object) -> bool:
    """Return whether ``kd`` computes a call whose other settings are the defaults."""
    return (
        isinstance(student_logits, Tensor)
        and student_logits.dim() == 2
        and type(dim) is int
        and (dim == 1 or dim == -1)
        and not learns(temperature)
        and (student_logits.shape[1] < MANY_CLASSES or student_logits.device.type != "cpu")
    )


def learns(temperature: object) -> bool:
    """Return whether the temperature is a tensor that may not become a number: it learns, or there are several."""
    if not isinstance(temperature, Tensor):
        return False
    return temperature.requires_grad or temperature.dim() > 0 or torch.compiler.is_compiling()


def kd_of_rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor,
    scale: bool,
    dim: int,
    mask: Tensor | None,
    labels: Tensor | None,
    ignore_index: int,
    reduction: RowReduction,
    divergence: DivergenceName,
    beta: float,
    standardize: bool,
    teacher_indices: Tensor | None,
    backend: Backend,
) -> Tensor:
    """The divergence of every row of logits of any shape, reduced; see ``kdkernels.kd_loss``."""
    checks.logits_along(student_logits, teacher_logits, dim, teacher_indices)
    dim = checks.dimension("dim", dim, student_logits)
    ignore_index = checks.integer("ignore_index", ignore_index)
    check_settings(temperature if not isinstance(temperature, Tensor) else 1.0, reduction, divergence, beta)
    if standardize and teacher_indices is not None:
        raise ValueError("standardize must be False with teacher_indices, because it needs all logits of the teacher")
    leading = student_logits.shape[:dim] + student_logits.shape[dim + 1 :]
    dtype = accumulation_dtype(student_logits, teacher_logits)
    if isinstance(temperature, Tensor):
        temperature = checks.temperature(temperature, student_logits, dim).to(dtype)
    else:
        temperature = torch.full(
            (), checks.positive("temperature", temperature), dtype=dtype, device=student_logits.device
        )
    counts = _counted(student_logits, dim, mask, labels, ignore_index)
    if counts is not None:
        temperature = torch.where(counts, temperature, 0)
    # Rows are outer x inner: most logits with two kinds of rows, such as samples and tokens, are views of this shape.
    split = dim if 0 < dim < len(leading) else 1
    shape = math.prod(leading[:split]), math.prod(leading[split:])
    rows = row_divergences(
        _as_rows(student_logits, dim, shape),
        _as_rows(teacher_logits, dim, shape),
        temperature.expand(leading).reshape(shape),
        None if teacher_indices is None else _as_rows(teacher_indices, dim, shape),
        kind=divergence,
        beta=checks.fraction("beta", beta),
        standardize=bool(standardize),
        backend=backend,
    ).reshape(leading)
    if scale:
        rows = rows * temperature.square()
    return _reduced(rows, counts, reduction)


def check_settings(
    temperature: object = 1.0, reduction: str = "batchmean", divergence: str = "forward", beta: object = 0.5
) -> None:
    checks.positive("temperature", temperature)
    checks.one_of("reduction", reduction, ROW_REDUCTIONS)
    checks.one_of("divergence", divergence, DIVERGENCES)
    checks.fraction("beta", beta)


def _as_rows(x: Tensor, dim: int, shape: tuple[int, int]) -> Tensor:
    """Return logits as outer x inner x classes. This is a view unless their strides allow none."""
    return x.movedim(dim, -1).reshape(*shape, x.shape[dim])


def _counted(logits: Tensor, dim: int, mask: Tensor | None, labels: Tensor | None, ignore_index: int) -> Tensor | None:
    """Return which rows count, in the leading shape, or None if all rows count."""
    counts = None
    if mask is not None:
        counts = checks.row_mask(mask, logits, dim)
    if labels is not None:
        known = checks.row_labels(labels, logits, dim, ignore_index) != ignore_index
        counts = known if counts is None else counts & known
    return counts


def _reduced(rows: Tensor, counts: Tensor | None, reduction: RowReduction) -> Tensor:
    if reduction == "none":
        return rows
    total = rows.sum()
    if reduction == "sum":
        return total
    if counts is None:
        return total / (rows.numel() if reduction == "mean" else len(rows))
    if reduction == "batchmean" and counts.dim() > 1:
        counts = counts.flatten(1).any(1)
    return total / counts.sum().clamp(min=1)
