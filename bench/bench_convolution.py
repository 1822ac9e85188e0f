"""3 x 3 convolutions of SemCKD's projections, with both gradients: ``pytest bench/bench_convolution.py``.

The limit is the rate of this machine's matrix products for the definition. It has 9 multiplications where Winograd's
algorithm has 4.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from measure import Case, Work
from torch import Tensor

from kdkernels.ops.convolution import convolution, convolution_backward


class Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, maps, weight):
        ctx.save_for_backward(maps, weight)
        return convolution(maps, weight)

    @staticmethod
    def backward(ctx, grad):
        return convolution_backward(grad, *ctx.saved_tensors, (True, True))


def inputs(batch: int, channels: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    maps, slopes = torch.randn(2, batch, side, side, channels).movedim(-1, 2)  # channels last
    weight = torch.randn(channels, channels, 3, 3) / channels
    return maps.relu().requires_grad_(), weight.requires_grad_(), slopes


def fused(maps: Tensor, weight: Tensor, slopes: Tensor) -> Tensor:
    return (Convolution.apply(maps, weight) * slopes).sum()


def textbook(maps: Tensor, weight: Tensor, slopes: Tensor) -> Tensor:
    return (F.conv2d(maps, weight, padding=1) * slopes).sum()


def work(maps: Tensor, weight: Tensor, slopes: Tensor) -> Work:
    return Work(multiply_adds=3 * maps[:, 0].numel() * weight.numel())


CASES = tuple(
    Case(
        f"convolution {c} channels, {side} x {side}",
        batch,
        inputs,
        (batch, c, side),
        fused,
        {"textbook": textbook},
        work,
    )
    for batch, c, side in ((64, 128, 16), (64, 256, 16), (64, 512, 8), (64, 512, 4), (16, 128, 4))
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_convolution(compare, case):
    compare(case)
