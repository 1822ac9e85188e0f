"""MobileNetV2 for small images."""

from __future__ import annotations

from torch import Tensor, nn

from .staged import StagedNetwork, conv_bn, stage

EXPANSION = 6
# Stages of groups of (channels, blocks, stride), at full width. The group before them has no expansion.
GROUPS = (((24, 2, 1),), ((32, 3, 2),), ((64, 4, 2), (96, 3, 1)), ((160, 3, 2), (320, 1, 1)))


class InvertedResidual(nn.Module):
    """Sandler et al. (2018): 1x1 to more channels, depthwise 3x3, linear 1x1 back. It is added to the input if the
    shapes agree.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int = EXPANSION) -> None:
        super().__init__()
        inner = inputs * expansion
        self.body = nn.Sequential(
            conv_bn(inputs, inner, 1),
            conv_bn(inner, inner, 3, stride, groups=inner),
            conv_bn(inner, outputs, 1, relu=False),
        )
        self.adds = stride == 1 and inputs == outputs

    def forward(self, features: Tensor) -> Tensor:
        return features + self.body(features) if self.adds else self.body(features)


def mobilenet_v2(
    in_channels: int, num_classes: int, *, divisor: int = 2, last: int = 1280, photographs: bool = False
) -> StagedNetwork:
    """Return MobileNetV2 with the full width divided by ``divisor``. 0.5x is usual in distillation papers, with ReLU in
    place of ReLU6, and one stride less than for ``photographs``.
    """
    inputs, first = 32 // divisor, 16 // divisor
    stem = conv_bn(in_channels, inputs, 3, 2)
    before: list[nn.Module] = [InvertedResidual(inputs, first, 1, expansion=1)]
    stages, channels = [], []
    inputs = first
    for groups in GROUPS:
        layers = before
        for full, depth, stride in groups:
            if photographs and not stages:
                stride = 2
            layers.append(stage(InvertedResidual, depth, inputs, full // divisor, stride))
            inputs = full // divisor
        stages.append(nn.Sequential(*layers))
        channels.append(inputs)
        before = []
    return StagedNetwork(stem, stages, channels, conv_bn(inputs, last, 1), num_classes, tail_channels=last)
