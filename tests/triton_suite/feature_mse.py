"""``feature_mse``"""

from __future__ import annotations

import pytest
import torch
from helpers import assert_as_good_as, assert_close
from torch import Tensor

import kdkernels

from . import draw


def check_feature_mse(projected: list[Tensor], targets: list[Tensor]) -> None:
    """Check one student layer and one teacher layer per pair: the loss, and the gradients to all inputs."""
    batch, pairs = projected[0].shape[0], len(projected)
    dtype = torch.promote_types(projected[0].dtype, torch.float32)
    weights = draw(batch, 1, pairs, device=projected[0].device, dtype=dtype)

    def run(backend: str, leaves: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        maps = [leaves[:pairs]], [leaves[pairs:-1]]
        loss = kdkernels.cross_layer_mse(*maps, leaves[-1], reduction="sum", backend=backend)
        return loss.detach(), torch.autograd.grad(2 * loss, leaves)

    leaves = [*projected, *targets, weights]
    loss, grads = run("triton", leaves)
    expected, correct = run("reference", [leaf.double() for leaf in leaves])
    assert_close(loss, expected, "loss")
    for leaf, grad, exact in zip(leaves, grads, correct, strict=True):
        assert grad.dtype == leaf.dtype
        if leaf.dtype in (torch.float32, torch.float64):
            assert_close(grad.to(loss.dtype), exact, "gradient")
        else:
            assert_as_good_as(grad, exact.to(leaf.dtype), exact, "gradient")


@pytest.mark.parametrize(
    ("own", "target"), [((1, 1), (1, 1)), ((7, 3), (4, 5)), ((2, 9), (5, 2)), ((1, 1), (8, 8)), ((33, 40), (33, 40))]
)
def test_feature_mse_of_odd_shapes(device: str, own: tuple[int, int], target: tuple[int, int]) -> None:
    check_feature_mse([draw(2, 3, *own, device=device)], [draw(2, 3, *target, device=device)])
