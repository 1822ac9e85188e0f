"""Divergences of two networks' softened class probabilities, one per row of logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...types import Backend, DivergenceName
from ..operator import Operator
from ..shapes import accumulation_dtype
from ..top_k import TOP_K, top_k
from . import fake, reference
from .boundary import needs_moments

DIVERGENCE = Operator(
    "divergence",
    kernels=(fake.divergence, fake.divergence_backward),
    memory="the gradients, and at most 20 numbers per row",
)


class Constants(NamedTuple):
    backend: str
    kind: int
    beta: float
    standardize: bool
    moments: bool = False


def divergence(
    student: Tensor,
    teacher: Tensor,
    temperatures: Tensor,
    indices: Tensor | None,
    *,
    kind: DivergenceName,
    beta: float,
    standardize: bool,
    backend: Backend = "auto",
) -> Tensor:
    """One divergence per row of checked logits, outer x inner x K; see ``reference.divergence``."""
    if kind == "jsd" and beta in (0, 1):  # the limits of JSD, divided by beta or 1 - beta
        kind = "forward" if beta == 0 else "reverse"
    tensors = student, teacher, temperatures
    if indices is not None:
        chosen = TOP_K.choose(backend, student)
        if chosen == "reference":
            return TOP_K.loss(chosen, tensors, (indices, kind, beta, standardize), reference.divergence)
        student, teacher, temperatures = _of_top_k(chosen, student, teacher, temperatures, indices)
        return divergence(
            student, teacher, temperatures, None, kind=kind, beta=beta, standardize=False, backend=backend
        )
    chosen = DIVERGENCE.choose(backend, student)
    if chosen == "reference":
        return DIVERGENCE.loss(chosen, tensors, (None, kind, beta, standardize), reference.divergence)
    settings = fake.KINDS[kind], beta, standardize
    return DIVERGENCE.result(chosen, tensors, settings, reference.divergence, (_losses, _gradients))


def _of_top_k(
    chosen: str, student: Tensor, log_p: Tensor, temperatures: Tensor, indices: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same comparison of k + 1 classes. The last is all classes that the teacher does not name."""
    dtype = accumulation_dtype(student, log_p)
    if dtype == torch.float64:
        student = student.double()
    counts = temperatures != 0
    exponents = top_k(chosen, student.flatten(0, 1), indices.flatten(0, 1), temperatures.flatten())
    exponents = exponents.view(*indices.shape[:2], -1)
    log_p = torch.where(counts[..., None], log_p.to(dtype), 0)  # a row that does not count may hold NaN
    return exponents, reference.with_rest(log_p, exponents), counts.to(dtype)


def _losses(
    constants: Sequence[object], tensors: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[tuple[Tensor], Sequence[Tensor], Constants]:
    """The losses of the rows. Saved are the logits, which costs nothing, unlike their gradients."""
    call = Constants(*constants)  # type: ignore[arg-type]
    call = call._replace(moments=needs_moments(call.kind, call.standardize, *wanted))
    losses, saved = fake.divergence.registered(call.backend)(*tensors, *call[1:])
    return (losses,), (*tensors, saved), call


def _gradients(grad: Tensor, saved: Sequence[Tensor], call: Constants, wanted: Sequence[bool]) -> list[Tensor | None]:
    backward = fake.divergence_backward.registered(call.backend)
    return list(backward(grad, *saved, *call[1:], *wanted))
