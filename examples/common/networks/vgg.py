"""VGG for small images: five blocks of 3x3 convolutions with one linear layer on top."""

from __future__ import annotations

from torch import nn

from .staged import StagedNetwork


def vgg(depth: int, in_channels: int, num_classes: int, *, width: int = 64) -> StagedNetwork:
    """Return VGG-8 (``depth`` = 1 convolution per block) or VGG-13 (2), with ``width``, 2, 4, 8 and 8 times ``width``
    channels (Simonyan and Zisserman 2015).

    The first block is the stem, and the others are the stages. As in the distillation papers, maps are halved before
    the first three stages, and the last two stages have equal size. The number in the name counts three linear layers,
    but there is only one here.
    """
    channels = (2 * width, 4 * width, 8 * width, 8 * width)
    stem = nn.Sequential(*_block(depth, in_channels, width))
    stages, inputs = [], width
    for outputs, halved in zip(channels, (True, True, True, False), strict=True):
        stages.append(nn.Sequential(*([nn.MaxPool2d(2)] if halved else []), *_block(depth, inputs, outputs)))
        inputs = outputs
    return StagedNetwork(stem, stages, channels, nn.Identity(), num_classes)


def _block(depth: int, inputs: int, outputs: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs = outputs
    return layers
