"""Inter-class correlation: row softmax of z zᵀ averaged over samples, and the divergence of two such maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ... import checks
from ...types import REDUCTIONS, Backend, Reduction
from ..autograd import LossWithGradients, distinct, needs_gradient
from ..operator import Operator, load
from . import fake, masked, reference

ICC = Operator(
    "icc",
    kernels=(fake.icc_loss, fake.icc_map, fake.icc_map_backward),
    memory="of the loss about 5·b·K numbers, of the map K² and as many for its gradient",
    over_ranks="two K x K maps, or twice as many where logits are too confident for them",
)


def icc_map(
    logits: Tensor, *, mask: Tensor | None = None, class_mask: Tensor | None = None, backend: Backend = "auto"
) -> Tensor:
    """Return the K x K map of b x K logits; see ``kdkernels.inter_class_correlation``."""
    check_map(logits, mask, class_mask)
    chosen = ICC.choose(backend, logits)
    settings = () if mask is None and class_mask is None else (mask, class_mask)
    return ICC.result(chosen, (logits,), settings, reference.icc_map, (_map, _map_gradient))


def icc_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    per_sample: bool,
    reduction: Reduction,
    mask: Tensor | None = None,
    class_mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """KL between two networks' maps; see ``kdkernels.inter_class_correlation_loss``."""
    check(student_logits, teacher_logits, reduction, mask, class_mask)
    chosen = ICC.choose(backend, student_logits)
    classes = student_logits.shape[1]
    if mask is None and class_mask is None:
        settings = bool(per_sample), 1.0 if reduction == "sum" else 1.0 / classes
        return ICC.loss(chosen, (student_logits, teacher_logits), settings, reference.icc_loss)
    loss = _of_counted(chosen, student_logits, teacher_logits, bool(per_sample), mask, class_mask)
    if reduction == "sum":
        return loss
    return loss / (classes if class_mask is None else class_mask.sum().clamp(min=1))


def _of_counted(
    chosen: str,
    student: Tensor,
    teacher: Tensor,
    per_sample: bool,
    mask: Tensor | None,
    class_mask: Tensor | None,
) -> Tensor:
    """Return the sum over the K² entries for the samples that count and the classes that are there."""
    if chosen == "reference":
        return ICC.loss(chosen, (student, teacher), (per_sample, 1.0, mask, class_mask), reference.icc_loss)
    if chosen == "triton":
        load(ICC.name, "triton")
    loss: Tensor
    settings = chosen, per_sample
    tensors = student, teacher, mask, class_mask
    if needs_gradient(student, teacher):
        loss = LossWithGradients.apply(masked.loss, settings, (), *distinct(tensors))[0]
        return loss
    loss = masked.loss(*tensors, *settings, False, False)[0]
    return loss


def check_map(logits: object, mask: object = None, class_mask: object = None) -> None:
    logits = checks.tensor("logits", logits, 2, "b x K")
    _check_masks(mask, class_mask, "logits", logits)


def check(student: object, teacher: object, reduction: str, mask: object = None, class_mask: object = None) -> None:
    student, _ = checks.logits(student, teacher)
    _check_masks(mask, class_mask, "student_logits", student)
    check_settings(reduction)


def _check_masks(mask: object, class_mask: object, name: str, logits: Tensor) -> None:
    checks.sample_mask(mask, name, logits)
    if class_mask is not None:
        checks.bools("class_mask", class_mask, logits.shape[1:], logits)


def check_settings(reduction: str) -> None:
    checks.one_of("reduction", reduction, REDUCTIONS)


def _map(
    constants: tuple[Any, ...], tensors: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[tuple[Tensor], Sequence[Tensor], tuple[Any, ...]]:
    backend, *masks = constants
    if masks:
        return (masked.map_of(*tensors, *masks, backend),), tensors, constants
    return (fake.icc_map.registered(backend)(*tensors),), tensors, constants


def _map_gradient(grad: Tensor, saved: Sequence[Tensor], kept: tuple[Any, ...], wanted: Sequence[bool]) -> list[Tensor]:
    backend, *masks = kept
    if masks:
        return [masked.map_backward(grad, *saved, *masks, backend)]
    return [fake.icc_map_backward.registered(backend)(grad, *saved)]
