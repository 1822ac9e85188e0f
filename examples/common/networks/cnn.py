"""The small convolutional network of the ICCT paper."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from .staged import StagedNetwork


def cnn5(in_channels: int, num_classes: int, *, width: int = 32, side: int = 4) -> StagedNetwork:
    """CNN-5: three 3x3 convolutions of ``width``, 2 and 4 times ``width`` channels, each with batch norm, max pooling
    and ReLU, and two fully connected layers. The first one is a convolution of the last map's size, ``side`` x
    ``side``, which is 4 for images of 32 x 32.
    """
    channels = (width, 2 * width, 4 * width)
    stages = [
        nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.MaxPool2d(2), nn.ReLU())
        for inputs, outputs in pairwise([in_channels, *channels])
    ]
    hidden = nn.Sequential(nn.Conv2d(channels[-1], channels[-1], side), nn.ReLU())
    return StagedNetwork(nn.Identity(), stages, channels, hidden, num_classes)
