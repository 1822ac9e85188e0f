"""The base of all networks: a stem, stages, and a linear classifier on the pooled last map."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn


class StagedNetwork(nn.Module):
    """A stem, stages, and a linear classifier on the pooled last map. It returns the logits and the maps of the stages.

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
        self.layers = tuple(f"stages.{index}" for index in range(len(self.channels)))  # the names of the stages
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
        """Return the classifier's input, n x channels, from the last stage's map."""
        return self.tail(features).mean((2, 3))


def stage(block: Callable[[int, int, int], nn.Module], depth: int, inputs: int, outputs: int, stride: int) -> nn.Module:
    """Return ``depth`` blocks of ``block(inputs, outputs, stride)``. The first block changes width and size."""
    return nn.Sequential(block(inputs, outputs, stride), *(block(outputs, outputs, 1) for _ in range(depth - 1)))


def conv_bn(inputs: int, outputs: int, size: int, stride: int = 1, *, groups: int = 1, relu: bool = True) -> nn.Module:
    """Return a convolution, which keeps the size or divides it by its stride, batch norm, and optionally ReLU."""
    if size == 1 and groups == 1:
        convolution = conv1x1(inputs, outputs, stride)
    else:
        convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), *([nn.ReLU()] if relu else []))


def conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, bias=False) if stride == 1 else StridedPointwise(inputs, outputs, stride)


class StridedPointwise(nn.Conv2d):
    """A 1x1 convolution that skips pixels, as a convolution with stride 1 of every ``stride``-th pixel.

    oneDNN's own one writes beyond its memory in the backward pass if the maps are in channels_last and have fewer
    channels than a vector (oneDNN issue 6035). PyTorch also takes an image with one channel as channels_last.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(inputs, outputs, 1, bias=False)
        self.skip = stride

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features[:, :, :: self.skip, :: self.skip])


class ChannelShuffle(nn.Module):
    """Zhang et al. (2018): interleaves the channels of ``groups`` groups."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, features: Tensor) -> Tensor:
        return features.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)
