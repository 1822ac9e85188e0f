"""The maps that SemCKD compares on 32 x 32 images. VGG-8 learns from ResNet-32x4. The paper's batch is 64."""

from __future__ import annotations

import torch
from torch import Tensor

STUDENT = ((128, 16), (256, 8), (512, 4), (512, 4))  # (channels, side) of the layers of VGG-8
TEACHER = ((64, 32), (128, 16), (256, 8))  # (channels, side) of the layers of ResNet-32x4
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def maps(batch: int, channels: int, side: int, memory_format: str, learns: bool = False) -> Tensor:
    features = torch.relu(torch.randn(batch, channels, side, side))
    return features.to(memory_format=FORMATS[memory_format]).requires_grad_(learns)
