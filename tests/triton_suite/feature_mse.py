"""``feature_mse``"""

from __future__ import annotations

import pytest
import torch
from helpers import assert_as_good_as, assert_close
from torch import Tensor

from kdkernels.ops.feature_mse import reference as feature_mse_reference
from kdkernels.ops.feature_mse import triton as feature_mse_triton

from . import FULL_PRECISION, draw, laid_out


def check_feature_mse(projected: list[Tensor], targets: list[Tensor]) -> None:
    """One student layer and a teacher layer per pair: loss, and gradients to everything."""
    batch, pairs = projected[0].shape[0], len(projected)
    dtype = torch.promote_types(projected[0].dtype, torch.float32)
    weights = draw(batch, 1, pairs, device=projected[0].device, dtype=dtype)

    def run(function, leaves: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        loss = function(leaves[:pairs], leaves[pairs:-1], leaves[-1], 0.3)
        return loss.detach(), torch.autograd.grad(2 * loss, leaves)

    leaves = [*projected, *targets, weights]
    loss, grads = run(feature_mse_triton.feature_mse, leaves)
    expected, correct = run(feature_mse_reference.feature_mse, [leaf.double() for leaf in leaves])
    assert_close(loss, expected, "loss")
    for leaf, grad, exact in zip(leaves, grads, correct, strict=True):
        assert grad.dtype == leaf.dtype
        if leaf.dtype in FULL_PRECISION:
            assert_close(grad.to(loss.dtype), exact, "gradient")
        else:
            assert_as_good_as(grad, exact.to(leaf.dtype), exact, "gradient")


@pytest.mark.parametrize("dtype", [*FULL_PRECISION, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "transposed"])
def test_feature_mse(device: str, dtype: torch.dtype, layout: str) -> None:
    def maps(*sizes: tuple[int, int, int]) -> list[Tensor]:
        return [laid_out(draw(2, *size, device=device, dtype=dtype), layout) for size in sizes]

    check_feature_mse(maps((3, 4, 4), (5, 2, 3), (2, 6, 5)), maps((3, 4, 4), (5, 4, 6), (2, 4, 3)))


@pytest.mark.parametrize(
    ("own", "target"), [((1, 1), (1, 1)), ((7, 3), (4, 5)), ((2, 9), (5, 2)), ((1, 1), (8, 8)), ((33, 40), (33, 40))]
)
def test_feature_mse_of_odd_shapes(device: str, own: tuple[int, int], target: tuple[int, int]) -> None:
    check_feature_mse([draw(2, 3, *own, device=device)], [draw(2, 3, *target, device=device)])


def test_feature_mse_of_mixed_dtypes(device: str) -> None:
    dtypes = (torch.float32, torch.bfloat16)
    maps = [draw(2, 3, 4, 4, device=device, dtype=dtype) for dtype in (*dtypes, *reversed(dtypes))]
    check_feature_mse(maps[:2], maps[2:])


def test_feature_mse_of_a_broken_map(device: str) -> None:
    for place in range(2):
        maps = [draw(2, 3, 4, 4, device=device) for _ in range(2)]
        maps[place][1, 2, 3, 3] = torch.nan
        weights = torch.ones(2, 1, 1, device=device)
        assert feature_mse_triton.feature_mse(maps[:1], maps[1:], weights, 1.0).isnan()
