"""ResNets and wide ResNets. Every stage except the first halves the map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

from torch import Tensor, nn

from .staged import StagedNetwork, conv1x1, conv_bn, stage


class BasicBlock(nn.Module):
    """He et al. (2016): two 3x3 convolutions, each with batch norm, and a 1x1 shortcut if the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv3x3(inputs, outputs, stride),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            conv3x3(outputs, outputs),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))
        self.relu = nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        return self.relu(self.body(features) + self.shortcut(features))


class BottleneckBlock(nn.Module):
    """He et al. (2016) and Xie et al. (2017): 1x1 to ``inner`` times the outputs, 3x3 in groups, 1x1 to the outputs."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, inner: float, groups: int) -> None:
        super().__init__()
        width = int(inner * outputs)
        self.body = nn.Sequential(
            conv_bn(inputs, width, 1),
            conv_bn(width, width, 3, stride, groups=groups),
            conv_bn(width, outputs, 1, relu=False),
        )
        changes = stride != 1 or inputs != outputs
        self.shortcut = conv_bn(inputs, outputs, 1, stride, relu=False) if changes else nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        return self.relu(self.body(features) + self.shortcut(features))


class PreactivationBlock(nn.Module):
    """Zagoruyko and Komodakis (2016): batch norm and ReLU before each 3x3 convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.activation = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.body = nn.Sequential(
            conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs), nn.ReLU(), conv3x3(outputs, outputs)
        )
        self.shortcut = conv1x1(inputs, outputs, stride) if inputs != outputs else None

    def forward(self, features: Tensor) -> Tensor:
        active = self.activation(features)
        return self.body(active) + (features if self.shortcut is None else self.shortcut(active))


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def resnet(
    depth: int, in_channels: int, num_classes: int, *, width: int = 16, stem_width: int | None = None
) -> StagedNetwork:
    """Return the CIFAR ResNet with ``depth`` = 6n + 2 and stages of ``width``, 2 and 4 times ``width`` channels."""
    inputs = stem_width or width
    channels = (width, 2 * width, 4 * width)
    stem = conv_bn(in_channels, inputs, 3)
    stages = _stages(BasicBlock, [(depth - 2) // 6] * 3, inputs, channels)
    return StagedNetwork(stem, stages, channels, nn.Identity(), num_classes)


def resnet18(in_channels: int, num_classes: int) -> StagedNetwork:
    """Return ResNet-18 with a first convolution for small images: four stages of two blocks."""
    channels = (64, 128, 256, 512)
    stages = _stages(BasicBlock, [2] * 4, 64, channels)
    return StagedNetwork(conv_bn(in_channels, 64, 3), stages, channels, nn.Identity(), num_classes)


def bottleneck_resnet(depths: Sequence[int], in_channels: int, num_classes: int) -> StagedNetwork:
    """Return ResNet-50 (``depths`` = 3, 4, 6, 3) or ResNet-101 (3, 4, 23, 3), with a first convolution for small
    images.
    """
    channels = (256, 512, 1024, 2048)
    stages = _stages(partial(BottleneckBlock, inner=0.25, groups=1), depths, 64, channels)
    return StagedNetwork(conv_bn(in_channels, 64, 3), stages, channels, nn.Identity(), num_classes)


def photograph_resnet(
    depths: Sequence[int],
    in_channels: int,
    num_classes: int,
    *,
    width: int = 64,
    block: Callable[[int, int, int], nn.Module] = BasicBlock,
) -> StagedNetwork:
    """Return a ResNet for images of 224 x 224 pixels. The stem divides each side by four. It is ResNet-18 (``depths`` =
    2, 2, 2, 2) or ResNet-34 (3, 4, 6, 3) with stages of ``width``, 2, 4 and 8 times ``width`` channels.
    """
    channels = tuple(width << index for index in range(4))
    stem = nn.Sequential(*conv_bn(in_channels, 64, 7, 2), nn.MaxPool2d(3, 2, padding=1))
    return StagedNetwork(stem, _stages(block, depths, 64, channels), channels, nn.Identity(), num_classes)


def resnext(
    depth: int, groups: int, in_channels: int, num_classes: int, *, inner: float = 2, width: int = 256, stem: int = 64
) -> StagedNetwork:
    """Return the CIFAR ResNeXt of ``depth`` = 9n + 2 layers, with stages of ``width``, 2 and 4 times ``width``
    channels. Inside a block there are ``inner`` times as many channels in ``groups`` groups. ResNeXt-29 (8x64d) has 29,
    8, 2 and 256.
    """
    channels = (width, 2 * width, 4 * width)
    stages = _stages(partial(BottleneckBlock, inner=inner, groups=groups), [(depth - 2) // 9] * 3, stem, channels)
    return StagedNetwork(conv_bn(in_channels, stem, 3), stages, channels, nn.Identity(), num_classes)


def wide_resnet(depth: int, factor: int, in_channels: int, num_classes: int) -> StagedNetwork:
    """Return WRN-``depth``-``factor``, where depth = 6n + 4."""
    channels = (16 * factor, 32 * factor, 64 * factor)
    stem = conv3x3(in_channels, 16)
    stages = _stages(PreactivationBlock, [(depth - 4) // 6] * 3, 16, channels)
    tail = nn.Sequential(nn.BatchNorm2d(channels[-1]), nn.ReLU())
    return StagedNetwork(stem, stages, channels, tail, num_classes)


def _stages(
    block: Callable[[int, int, int], nn.Module], depths: Sequence[int], inputs: int, channels: Sequence[int]
) -> list[nn.Module]:
    return [
        stage(block, depth, before, after, 1 if index == 0 else 2)
        for index, (depth, (before, after)) in enumerate(zip(depths, pairwise([inputs, *channels]), strict=True))
    ]
