"""The maps that SemCKD compares on 32 x 32 images: VGG-8 learns from ResNet-32x4 at batch 64, as in the paper."""

from __future__ import annotations

import torch
from torch import Tensor

BATCH = 64
STUDENT = ((128, 16), (256, 8), (512, 4), (512, 4))  # channels and side of VGG-8's layers
TEACHER = ((64, 32), (128, 16), (256, 8))  # and of ResNet-32x4's
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def maps(channels: int, side: int, memory_format: str, learns: bool = False) -> Tensor:
    features = torch.relu(torch.randn(BATCH, channels, side, side))
    return features.to(memory_format=FORMATS[memory_format]).requires_grad_(learns)
