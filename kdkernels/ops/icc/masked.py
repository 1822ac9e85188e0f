"""The kernels of ``icc`` on the samples that count and the classes that are there.

The operators below read on the host how many samples and classes there are, and give the kernels only these. They are
operators because torch.compile cannot trace tensors whose sizes depend on values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, library

from ..shapes import accumulation_dtype, loss_and_gradients
from . import fake


def _operator(schema: str, fake: Callable[..., object], run: Callable[..., object]) -> None:
    name = f"kdkernels_traced::{schema.partition('(')[0]}"
    library.define(name, schema[schema.index("(") :])
    library.impl(name, ("CPU", "CUDA"))(run)
    library.register_fake(name)(fake)


def _places(mask: Tensor | None, size: int, like: Tensor) -> Tensor:
    if mask is None:
        return torch.arange(size, device=like.device)
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "mask and class_mask must be None while a CUDA graph is captured, because the kernel reads on the host how "
            "many samples and classes count; use backend='reference'"
        )
    return mask.nonzero()[:, 0]


def _loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    class_mask: Tensor | None,
    backend: str,
    per_sample: bool,
    grad_student: bool,
    grad_teacher: bool,
) -> tuple[Tensor, ...]:
    results = tuple(x.zero_() for x in loss_and_gradients(student, teacher, grad_student, grad_teacher))
    rows, columns = _places(mask, student.shape[0], student), _places(class_mask, student.shape[1], student)
    if not len(rows) or not len(columns):
        return results
    short = (z.index_select(0, rows).index_select(1, columns) for z in (student, teacher))
    loss, *gradients = fake.icc_loss.registered(backend)(*short, per_sample, 1.0, grad_student, grad_teacher)
    for result, gradient in zip(results[1:], gradients, strict=True):
        if len(result):  # an unwanted gradient is empty
            result[rows[:, None], columns] = gradient
    return loss, *results[1:]


def _fake_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    class_mask: Tensor | None,
    backend: str,
    per_sample: bool,
    grad_student: bool,
    grad_teacher: bool,
) -> tuple[Tensor, ...]:
    return loss_and_gradients(student, teacher, grad_student, grad_teacher)


def _map(logits: Tensor, mask: Tensor | None, class_mask: Tensor | None, backend: str) -> Tensor:
    result = logits.new_zeros((logits.shape[1], logits.shape[1]), dtype=accumulation_dtype(logits))
    rows, columns = _places(mask, logits.shape[0], logits), _places(class_mask, logits.shape[1], logits)
    if len(rows) and len(columns):
        short = logits.index_select(0, rows).index_select(1, columns)
        result[columns[:, None], columns] = fake.icc_map.registered(backend)(short)
    return result


def _fake_map(logits: Tensor, mask: Tensor | None, class_mask: Tensor | None, backend: str) -> Tensor:
    return logits.new_empty((logits.shape[1], logits.shape[1]), dtype=accumulation_dtype(logits))


def _map_backward(
    grad_map: Tensor, logits: Tensor, mask: Tensor | None, class_mask: Tensor | None, backend: str
) -> Tensor:
    result = logits.new_zeros(logits.shape, dtype=accumulation_dtype(logits))
    rows, columns = _places(mask, logits.shape[0], logits), _places(class_mask, logits.shape[1], logits)
    if len(rows) and len(columns):
        short = logits.index_select(0, rows).index_select(1, columns)
        of_map = grad_map.index_select(0, columns).index_select(1, columns)
        result[rows[:, None], columns] = fake.icc_map_backward.registered(backend)(of_map, short)
    return result


def _fake_map_backward(
    grad_map: Tensor, logits: Tensor, mask: Tensor | None, class_mask: Tensor | None, backend: str
) -> Tensor:
    return logits.new_empty(logits.shape, dtype=accumulation_dtype(logits))


_operator(
    "icc_loss_of_counted(Tensor student, Tensor teacher, Tensor? mask, Tensor? class_mask, str backend, "
    "bool per_sample, bool grad_student, bool grad_teacher) -> (Tensor, Tensor, Tensor)",
    _fake_loss,
    _loss,
)
_operator("icc_map_of_counted(Tensor logits, Tensor? mask, Tensor? class_mask, str backend) -> Tensor", _fake_map, _map)
_operator(
    "icc_map_of_counted_backward(Tensor grad_map, Tensor logits, Tensor? mask, Tensor? class_mask, str backend) "
    "-> Tensor",
    _fake_map_backward,
    _map_backward,
)
loss = torch.ops.kdkernels_traced.icc_loss_of_counted.default
map_of = torch.ops.kdkernels_traced.icc_map_of_counted.default
map_backward = torch.ops.kdkernels_traced.icc_map_of_counted_backward.default
