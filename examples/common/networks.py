"""Networks for small images: ResNets and wide ResNets in three stages, and ResNets of half the width for digits.

Every network maps images to ``(logits, stages)``, ``stages`` being the feature maps at the end of each stage, and has
``channels``, the width of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class StagedNetwork(nn.Module):
    """A stem, stages that each halve the map after the first, and a linear classifier on the pooled last stage.

    Args:
        block: called as ``block(inputs, outputs, stride)``; a residual block.
        depth: blocks per stage.
        channels: width of each stage.
        stem: the layers from the image to the first block.
        tail: the layers between the last block and the pooling.
    """

    def __init__(
        self,
        block: Callable[[int, int, int], nn.Module],
        depth: int,
        channels: Sequence[int],
        stem: nn.Module,
        stem_channels: int,
        tail: nn.Module,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.stem = stem
        inputs = stem_channels
        stages = []
        for index, outputs in enumerate(channels):
            first = block(inputs, outputs, 1 if index == 0 else 2)
            stages.append(nn.Sequential(first, *(block(outputs, outputs, 1) for _ in range(depth - 1))))
            inputs = outputs
        self.stages = nn.ModuleList(stages)
        self.tail = tail
        self.classifier = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = self.stem(images)
        stages = []
        for stage in self.stages:
            features = stage(features)
            stages.append(features)
        return self.classifier(self.tail(features).mean((2, 3))), stages


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

    def forward(self, features: Tensor) -> Tensor:
        return F.relu(self.body(features) + self.shortcut(features))


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


def resnet(depth: int, in_channels: int, num_classes: int, *, width: int = 16) -> StagedNetwork:
    """The CIFAR ResNet of ``depth`` = 6n + 2 layers with stages of ``width``, 2 and 4 times ``width`` channels."""
    stem = nn.Sequential(conv3x3(in_channels, width), nn.BatchNorm2d(width), nn.ReLU())
    channels = (width, 2 * width, 4 * width)
    return StagedNetwork(BasicBlock, (depth - 2) // 6, channels, stem, width, nn.Identity(), num_classes)


def wide_resnet(depth: int, factor: int, in_channels: int, num_classes: int) -> StagedNetwork:
    """WRN-``depth``-``factor``, depth = 6n + 4."""
    channels = (16 * factor, 32 * factor, 64 * factor)
    tail = nn.Sequential(nn.BatchNorm2d(channels[-1]), nn.ReLU())
    return StagedNetwork(
        PreactivationBlock, (depth - 4) // 6, channels, conv3x3(in_channels, 16), 16, tail, num_classes
    )


NETWORKS: dict[str, Callable[[int, int], StagedNetwork]] = {
    "resnet8-half": lambda channels, classes: resnet(8, channels, classes, width=8),
    "resnet14-half": lambda channels, classes: resnet(14, channels, classes, width=8),
    "resnet14": lambda channels, classes: resnet(14, channels, classes),
    "resnet20": lambda channels, classes: resnet(20, channels, classes),
    "resnet110": lambda channels, classes: resnet(110, channels, classes),
    "wrn-16-1": lambda channels, classes: wide_resnet(16, 1, channels, classes),
    "wrn-16-2": lambda channels, classes: wide_resnet(16, 2, channels, classes),
    "wrn-40-2": lambda channels, classes: wide_resnet(40, 2, channels, classes),
}


def build(name: str, in_channels: int, num_classes: int) -> StagedNetwork:
    return NETWORKS[name](in_channels, num_classes)


def parameter_count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
