"""``divergence``"""

from __future__ import annotations

import functools

import pytest
import torch
from helpers import assert_matches
from torch import Tensor

import kdkernels

from . import FULL_PRECISION, draw, laid_out

KINDS = [{"divergence": "forward"}, {"divergence": "reverse"}, {"divergence": "jsd", "beta": 0.3}]


@pytest.mark.parametrize("dtype", FULL_PRECISION)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind["divergence"])
@pytest.mark.parametrize(("shape", "dim", "layout"), [((2, 7, 3), 1, "contiguous"), ((3, 2, 33), 2, "transposed")])
@pytest.mark.parametrize("standardize", [False, True])
def test_divergence(
    device: str, dtype: torch.dtype, kind: dict, shape: tuple, dim: int, layout: str, standardize: bool
) -> None:
    inputs = [laid_out(3 * draw(*shape, device=device, dtype=dtype), layout).requires_grad_() for _ in range(2)]
    rows = shape[:dim] + shape[dim + 1 :]
    temperature = (1 + draw(*rows, device=device, dtype=dtype).abs()).requires_grad_()
    mask = torch.ones(rows, dtype=torch.bool, device=device)
    mask[0, 1] = False
    loss = functools.partial(kdkernels.kd_loss, dim=dim, mask=mask, standardize=standardize, **kind)

    def run(s: Tensor, t: Tensor, T: Tensor, backend: str = "triton") -> Tensor:
        return loss(s, t, temperature=T, backend=backend)

    assert_matches(run, functools.partial(run, backend="reference"), *inputs, temperature)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind["divergence"])
def test_divergence_of_absent_classes(device: str, kind: dict) -> None:
    student, teacher = (draw(4, 9, device=device) for _ in range(2))
    student[:, 3], teacher[:, 3] = -torch.inf, -torch.inf
    (student if kind["divergence"] == "reverse" else teacher)[1, 5] = -torch.inf
    loss = functools.partial(kdkernels.kd_loss, **kind)
    assert_matches(
        functools.partial(loss, backend="triton"),
        functools.partial(loss, backend="reference"),
        student.requires_grad_(),
        teacher.requires_grad_(),
    )
