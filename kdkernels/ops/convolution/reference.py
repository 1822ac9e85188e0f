"""PyTorch's convolutions: the specification of ``convolution``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def convolution(maps: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(maps, weight, padding=weight.shape[-1] // 2)


def convolution_backward(
    grad: Tensor, maps: Tensor, weight: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    padding = weight.shape[-1] // 2
    geometry = [1, 1], [padding, padding], [1, 1], False, [0, 0], 1
    of_maps, of_weight, _ = torch.ops.aten.convolution_backward(grad, maps, weight, None, *geometry, [*wanted, False])
    return of_maps, of_weight
