"""ResNets and wide ResNets, of whose stages all but the first halve the map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from .staged import StagedNetwork, stage


class BasicBlock(nn.Module):
    """He et al. (2016): two 3x3 convolutions, batch norm after each; a 1x1 shortcut where the shape changes."""

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
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
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
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, features: Tensor) -> Tensor:
        active = self.activation(features)
        return self.body(active) + (features if self.shortcut is None else self.shortcut(active))


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def resnet(
    depth: int, in_channels: int, num_classes: int, *, width: int = 16, stem_width: int | None = None
) -> StagedNetwork:
    """The CIFAR ResNet of ``depth`` = 6n + 2 layers with stages of ``width``, 2 and 4 times ``width`` channels."""
    inputs = stem_width or width
    stem = nn.Sequential(conv3x3(in_channels, inputs), nn.BatchNorm2d(inputs), nn.ReLU())
    channels = (width, 2 * width, 4 * width)
    stages = _stages(BasicBlock, (depth - 2) // 6, inputs, channels)
    return StagedNetwork(stem, stages, channels, nn.Identity(), num_classes)


def resnet18(in_channels: int, num_classes: int) -> StagedNetwork:
    """ResNet-18 with its first convolution for small images: four stages of two blocks."""
    channels = (64, 128, 256, 512)
    stem = nn.Sequential(conv3x3(in_channels, 64), nn.BatchNorm2d(64), nn.ReLU())
    return StagedNetwork(stem, _stages(BasicBlock, 2, 64, channels), channels, nn.Identity(), num_classes)


def wide_resnet(depth: int, factor: int, in_channels: int, num_classes: int) -> StagedNetwork:
    """WRN-``depth``-``factor``, depth = 6n + 4."""
    channels = (16 * factor, 32 * factor, 64 * factor)
    stem = conv3x3(in_channels, 16)
    stages = _stages(PreactivationBlock, (depth - 4) // 6, 16, channels)
    tail = nn.Sequential(nn.BatchNorm2d(channels[-1]), nn.ReLU())
    return StagedNetwork(stem, stages, channels, tail, num_classes)


def _stages(
    block: Callable[[int, int, int], nn.Module], depth: int, inputs: int, channels: Sequence[int]
) -> list[nn.Module]:
    return [
        stage(block, depth, before, after, 1 if index == 0 else 2)
        for index, (before, after) in enumerate(pairwise([inputs, *channels]))
    ]
