"""``rkd``"""

from __future__ import annotations

import functools

import pytest
from helpers import assert_matches

import kdkernels

from . import draw


@pytest.mark.parametrize("weights", [(25.0, 50.0), (1.0, 0.0), (0.0, 1.0)], ids=str)
@pytest.mark.parametrize("batch", [1, 5, 19])
def test_rkd_of_equal_and_zero_rows(device: str, batch: int, weights: tuple[float, float]) -> None:
    x, y = draw(batch, 13, device=device), draw(batch, 9, device=device)
    x[batch // 2] = x[0]
    y[batch - 1] = 0
    run = functools.partial(kdkernels.relational_kd_loss, distance_weight=weights[0], angle_weight=weights[1])
    fused, definition = (functools.partial(run, backend=name) for name in ("triton", "reference"))
    assert_matches(fused, definition, x.requires_grad_(), y.requires_grad_())
