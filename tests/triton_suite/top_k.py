"""``top_k``"""

from __future__ import annotations

import functools

import pytest
import torch
from helpers import assert_matches
from torch import Tensor

import kdkernels

from . import FULL_PRECISION, draw, laid_out

KINDS = ["forward", "reverse", "jsd"]


def of_teacher(rows: tuple[int, ...], classes: int, count: int, device: str) -> tuple[Tensor, Tensor]:
    """Return classes, and log-probabilities that leave some probability for the other classes."""
    indices = torch.stack([torch.randperm(classes)[:count] for _ in range(rows[0] * rows[1])])
    log_p = torch.randn(*rows, classes).log_softmax(-1)
    indices = indices.reshape(*rows, count)
    return indices.to(device), log_p.gather(-1, indices).to(device)


@pytest.mark.parametrize("dtype", FULL_PRECISION)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("classes", "count", "layout"), [(7, 1, "transposed"), (33, 5, "contiguous")])
def test_top_k(device: str, dtype: torch.dtype, kind: str, classes: int, count: int, layout: str) -> None:
    student = laid_out(3 * draw(2, 3, classes, device=device, dtype=dtype), layout).requires_grad_()
    indices, log_p = of_teacher((2, 3), classes, count, device)
    temperature = (1 + draw(2, 3, device=device, dtype=dtype).abs()).requires_grad_()
    mask = torch.tensor([[True, True, False], [True, True, True]], device=device)
    loss = functools.partial(kdkernels.kd_loss, teacher_indices=indices, mask=mask, divergence=kind)

    def run(s: Tensor, t: Tensor, T: Tensor, backend: str = "triton") -> Tensor:
        return loss(s, t, temperature=T, backend=backend)

    teacher = log_p.to(dtype).requires_grad_()
    assert_matches(run, functools.partial(run, backend="reference"), student, teacher, temperature)


@pytest.mark.slow
def test_top_k_in_blocks(device: str) -> None:
    """More classes, and more classes of the teacher, than one block has."""
    student = (3 * draw(2, 2, 9001, device=device)).requires_grad_()
    indices, log_p = of_teacher((2, 2), 9001, 3, device)
    loss = functools.partial(kdkernels.kd_loss, teacher_indices=indices)
    assert_matches(
        functools.partial(loss, backend="triton"), functools.partial(loss, backend="reference"), student, log_p
    )


def test_top_k_of_absent_classes(device: str) -> None:
    """A class of the teacher, one other class, or all other classes have -inf."""
    student = draw(1, 3, 6, device=device)
    student[0, 0, 4] = student[0, 2, 1:] = -torch.inf
    indices = torch.zeros(1, 3, 1, dtype=torch.int64, device=device)
    log_p = torch.full((1, 3, 1), 0.7, device=device).log()
    log_p[0, 2] = 0.0
    loss = functools.partial(kdkernels.kd_loss, teacher_indices=indices)
    assert_matches(
        functools.partial(loss, backend="triton"),
        functools.partial(loss, backend="reference"),
        student.requires_grad_(),
        log_p,
    )


def test_top_k_of_an_index_that_is_no_class_is_nan(device: str) -> None:
    student = draw(3, 5, device=device)
    indices = torch.tensor([[0, 4], [5, 1], [2, -1]], device=device)
    exponents = torch.ops.kdkernels_triton.top_k(student, indices, torch.ones(3, device=device))
    assert exponents.isnan().tolist() == [[False] * 3, [True, False, False], [False, True, False]]
