"""What all networks are made of: a stem, stages, and a linear classifier on the pooled last map."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn


class StagedNetwork(nn.Module):
    """A stem, stages whose maps are returned beside the logits, and a linear classifier on the pooled last one.

    Args:
        stem: the layers from the image to the first stage.
        stages: one module each.
        channels: width of each stage.
        tail: the layers between the last stage and the pooling.
        num_classes: outputs of the classifier.
        tail_channels: width of the tail; by default the last stage's.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Iterable[nn.Module],
        channels: Sequence[int],
        tail: nn.Module,
        num_classes: int,
        *,
        tail_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.tail = tail
        self.classifier = nn.Linear(tail_channels or self.channels[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = self.stem(images)
        stages = []
        for stage in self.stages:
            features = stage(features)
            stages.append(features)
        return self.classifier(self.pool(features)), stages

    def pool(self, features: Tensor) -> Tensor:
        """What the classifier sees of the last stage's map, n x channels."""
        return self.tail(features).mean((2, 3))


def stage(block: Callable[[int, int, int], nn.Module], depth: int, inputs: int, outputs: int, stride: int) -> nn.Module:
    """``depth`` blocks, each made by ``block(inputs, outputs, stride)``; the first changes width and size."""
    return nn.Sequential(block(inputs, outputs, stride), *(block(outputs, outputs, 1) for _ in range(depth - 1)))


def conv_bn(inputs: int, outputs: int, size: int, stride: int = 1, *, groups: int = 1, relu: bool = True) -> nn.Module:
    """Convolution that keeps or, by its stride, divides the size; batch norm; ReLU if asked for."""
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), *([nn.ReLU()] if relu else []))


class ChannelShuffle(nn.Module):
    """Zhang et al. (2018): the channels of ``groups`` groups take turns."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, features: Tensor) -> Tensor:
        return features.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)
