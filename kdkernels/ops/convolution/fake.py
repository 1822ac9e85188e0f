"""The schemas of ``convolution`` and the shapes of its results."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operator import kernel
from .boundary import check_convolution, check_convolution_weight


@kernel("convolution(Tensor maps, Tensor weight, bool transposed) -> Tensor", check=check_convolution)
def convolution(maps: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    n, _, h, w = maps.shape
    return maps.new_empty((n, h, w, weight.shape[1 if transposed else 0])).permute(0, 3, 1, 2)


@kernel(
    "convolution_weight(Tensor maps, Tensor grad, bool channels_last) -> Tensor grad_weight",
    check=check_convolution_weight,
)
def convolution_weight(maps: Tensor, grad: Tensor, channels_last: bool) -> Tensor:
    weight = maps.new_empty((grad.shape[1], maps.shape[1], 3, 3))
    return weight.contiguous(memory_format=torch.channels_last) if channels_last else weight
