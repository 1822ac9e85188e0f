"""ShuffleNet V1 and V2. For small images, the stem neither strides nor pools, so the first stage has all pixels."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from .staged import ChannelShuffle, StagedNetwork, conv_bn, stage

STEM = 24
DEPTHS = (4, 8, 4)


class UnitV1(nn.Module):
    """Zhang et al. (2018), Fig. 2: grouped 1x1, shuffle, depthwise 3x3, grouped 1x1. With a stride, the pooled input is
    concatenated, not added.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, *, groups: int) -> None:
        super().__init__()
        self.concatenates = stride > 1
        outputs = outputs - inputs if self.concatenates else outputs
        inner = outputs // 4
        # The stem has too few channels for groups.
        first = 1 if inputs == STEM else groups
        self.body = nn.Sequential(
            conv_bn(inputs, inner, 1, groups=first),
            ChannelShuffle(first),
            conv_bn(inner, inner, 3, stride, groups=inner, relu=False),
            conv_bn(inner, outputs, 1, groups=groups, relu=False),
        )
        self.shortcut = nn.AvgPool2d(3, stride, padding=1) if self.concatenates else nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        residual, shortcut = self.body(features), self.shortcut(features)
        return self.relu(torch.cat([residual, shortcut], 1) if self.concatenates else residual + shortcut)


class UnitV2(nn.Module):
    """Ma et al. (2018), Fig. 3: one half of the channels is passed on (with a stride, through its own branch), the
    other half goes through 1x1, depthwise 3x3, 1x1. Then all channels are shuffled.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        inner = outputs // 2
        self.splits = stride == 1
        entering = inputs // 2 if self.splits else inputs
        self.body = nn.Sequential(
            conv_bn(entering, inner, 1),
            conv_bn(inner, inner, 3, stride, groups=inner, relu=False),
            conv_bn(inner, inner, 1),
        )
        self.shortcut = nn.Identity()
        if not self.splits:
            self.shortcut = nn.Sequential(
                conv_bn(inputs, inputs, 3, stride, groups=inputs, relu=False), conv_bn(inputs, inner, 1)
            )
        self.shuffle = ChannelShuffle(2)

    def forward(self, features: Tensor) -> Tensor:
        passing, entering = features.chunk(2, 1) if self.splits else (features, features)
        return self.shuffle(torch.cat([self.shortcut(passing), self.body(entering)], 1))


def shufflenet_v1(
    in_channels: int, num_classes: int, *, channels: tuple[int, int, int] = (240, 480, 960)
) -> StagedNetwork:
    """Return ShuffleNet, by default 1x with 3 groups."""
    stem = conv_bn(in_channels, STEM, 1)
    stages = [
        stage(partial(UnitV1, groups=3), depth, before, after, 2)
        for depth, (before, after) in zip(DEPTHS, pairwise([STEM, *channels]), strict=True)
    ]
    return StagedNetwork(stem, stages, channels, nn.Identity(), num_classes)


def shufflenet_v2(
    in_channels: int,
    num_classes: int,
    *,
    channels: tuple[int, int, int] = (116, 232, 464),
    last: int = 1024,
    photographs: bool = False,
) -> StagedNetwork:
    """Return ShuffleNetV2, by default 1x. For ``photographs``, the stem divides each side by four."""
    stem = conv_bn(in_channels, STEM, 1)
    if photographs:
        stem = nn.Sequential(*conv_bn(in_channels, STEM, 3, 2), nn.MaxPool2d(3, 2, padding=1))
    stages = [
        stage(UnitV2, depth, before, after, 2)
        for depth, (before, after) in zip(DEPTHS, pairwise([STEM, *channels]), strict=True)
    ]
    return StagedNetwork(stem, stages, channels, conv_bn(channels[-1], last, 1), num_classes, tail_channels=last)
