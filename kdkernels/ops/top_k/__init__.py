"""The student's side of a teacher of whom only the k most probable classes are known."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..operator import Operator
from . import fake, reference

TOP_K = Operator(
    "top_k",
    kernels=(fake.top_k, fake.top_k_backward),
    native=("cpu",),
    memory="the gradient, and k + 1 numbers per row",
)


def top_k(chosen: str, student: Tensor, indices: Tensor, temperatures: Tensor) -> Tensor:
    """Return ``reference.with_others`` of the logits divided by the temperatures.

    Logits N x K, indices N x k, temperatures N, where 0 stands for a row that does not count.
    """
    rules = _exponents, _gradients
    return TOP_K.result(chosen, (student, indices, temperatures), (), reference.with_others, rules)


def _exponents(
    constants: Sequence[str], tensors: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[tuple[Tensor], Sequence[Tensor], str]:
    return (fake.top_k.registered(constants[0])(*tensors),), tensors, constants[0]


def _gradients(grad: Tensor, saved: Sequence[Tensor], backend: str, wanted: Sequence[bool]) -> list[Tensor | None]:
    of_student, of_temperatures = fake.top_k_backward.registered(backend)(grad, *saved, wanted[0], wanted[2])
    return [of_student, None, of_temperatures]
