"""Networks by name: for images of 32 x 32 pixels, for photographs of 224 x 224, and small ones for digits.

Every network maps images to ``(logits, stages)``, ``stages`` being the feature maps at the end of each stage, and has
``channels``, the width of each. Its stages are the submodules ``stages.0``, ``stages.1``, ...
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

from torch import nn

from . import foreign
from .cnn import cnn5
from .foreign import ForeignNetwork, weights_file
from .mobilenet import mobilenet_v2
from .resnet import BottleneckBlock, bottleneck_resnet, photograph_resnet, resnet, resnet18, resnext, wide_resnet
from .shufflenet import shufflenet_v1, shufflenet_v2
from .staged import StagedNetwork
from .vgg import vgg

__all__ = [
    "DOUBLES",
    "NETWORKS",
    "ForeignNetwork",
    "StagedNetwork",
    "build",
    "checked_name",
    "parameter_count",
    "weights_file",
]

NETWORKS: dict[str, Callable[[int, int], StagedNetwork]] = {
    "resnet8-quarter": lambda channels, classes: resnet(8, channels, classes, width=4),
    "resnet8-half": lambda channels, classes: resnet(8, channels, classes, width=8),
    "resnet8": lambda channels, classes: resnet(8, channels, classes),
    "resnet14-half": lambda channels, classes: resnet(14, channels, classes, width=8),
    "resnet14": lambda channels, classes: resnet(14, channels, classes),
    "resnet20": lambda channels, classes: resnet(20, channels, classes),
    "resnet110": lambda channels, classes: resnet(110, channels, classes),
    "resnet8x4": lambda channels, classes: resnet(8, channels, classes, width=64, stem_width=32),
    "resnet8x8": lambda channels, classes: resnet(8, channels, classes, width=128, stem_width=64),
    "resnet32x4": lambda channels, classes: resnet(32, channels, classes, width=64, stem_width=32),
    "resnet18": resnet18,
    "resnet50": lambda channels, classes: bottleneck_resnet((3, 4, 6, 3), channels, classes),
    "resnet101": lambda channels, classes: bottleneck_resnet((3, 4, 23, 3), channels, classes),
    "resnext11-small": lambda channels, classes: resnext(11, 2, channels, classes, inner=0.5, width=16, stem=8),
    "resnext29": lambda channels, classes: resnext(29, 8, channels, classes),
    "wrn-10-1": lambda channels, classes: wide_resnet(10, 1, channels, classes),
    "wrn-10-2": lambda channels, classes: wide_resnet(10, 2, channels, classes),
    "wrn-16-1": lambda channels, classes: wide_resnet(16, 1, channels, classes),
    "wrn-16-2": lambda channels, classes: wide_resnet(16, 2, channels, classes),
    "wrn-16-4": lambda channels, classes: wide_resnet(16, 4, channels, classes),
    "wrn-16-10": lambda channels, classes: wide_resnet(16, 10, channels, classes),
    "wrn-28-2": lambda channels, classes: wide_resnet(28, 2, channels, classes),
    "wrn-40-2": lambda channels, classes: wide_resnet(40, 2, channels, classes),
    "wrn-28-10": lambda channels, classes: wide_resnet(28, 10, channels, classes),
    "cnn5-quarter": lambda channels, classes: cnn5(channels, classes, width=8, side=2),
    "cnn5": cnn5,
    "vgg8-eighth": lambda channels, classes: vgg(1, channels, classes, width=8),
    "vgg8-quarter": lambda channels, classes: vgg(1, channels, classes, width=16),
    "vgg8": lambda channels, classes: vgg(1, channels, classes),
    "vgg8-double": lambda channels, classes: vgg(1, channels, classes, width=128),
    "vgg13-eighth": lambda channels, classes: vgg(2, channels, classes, width=8),
    "vgg13-quarter": lambda channels, classes: vgg(2, channels, classes, width=16),
    "vgg13": lambda channels, classes: vgg(2, channels, classes),
    "vgg13-double": lambda channels, classes: vgg(2, channels, classes, width=128),
    "shufflenetv1-quarter": lambda channels, classes: shufflenet_v1(channels, classes, channels=(60, 120, 240)),
    "shufflenetv1-half": lambda channels, classes: shufflenet_v1(channels, classes, channels=(120, 240, 480)),
    "shufflenetv1": shufflenet_v1,
    "shufflenetv1-double": lambda channels, classes: shufflenet_v1(channels, classes, channels=(480, 960, 1920)),
    "shufflenetv2-quarter": lambda channels, classes: shufflenet_v2(
        channels, classes, channels=(32, 64, 128), last=128
    ),
    "shufflenetv2-half": lambda channels, classes: shufflenet_v2(channels, classes, channels=(64, 128, 256), last=256),
    "shufflenetv2": shufflenet_v2,
    "shufflenetv2-double": lambda channels, classes: shufflenet_v2(
        channels, classes, channels=(232, 464, 928), last=2048
    ),
    "mobilenetv2-eighth": lambda channels, classes: mobilenet_v2(channels, classes, divisor=8, last=128),
    "mobilenetv2-quarter": lambda channels, classes: mobilenet_v2(channels, classes, divisor=4, last=256),
    "mobilenetv2": mobilenet_v2,
    "mobilenetv2-full": lambda channels, classes: mobilenet_v2(channels, classes, divisor=1),
    "resnet18-224": lambda channels, classes: photograph_resnet((2, 2, 2, 2), channels, classes),
    "resnet34-224": lambda channels, classes: photograph_resnet((3, 4, 6, 3), channels, classes),
    "resnet50-224": lambda channels, classes: photograph_resnet(
        (3, 4, 6, 3), channels, classes, width=256, block=partial(BottleneckBlock, inner=0.25, groups=1)
    ),
    "resnext101-224": lambda channels, classes: photograph_resnet(
        (3, 4, 23, 3), channels, classes, width=256, block=partial(BottleneckBlock, inner=1, groups=64)
    ),
    "wrn-18-2-224": lambda channels, classes: photograph_resnet((2, 2, 2, 2), channels, classes, width=128),
    "wrn-34-2-224": lambda channels, classes: photograph_resnet((3, 4, 6, 3), channels, classes, width=128),
    "shufflenetv2-half-224": lambda channels, classes: shufflenet_v2(
        channels, classes, channels=(48, 96, 192), photographs=True
    ),
    "shufflenetv2-224": lambda channels, classes: shufflenet_v2(
        channels, classes, channels=(96, 192, 384), last=2048, photographs=True
    ),
    "mobilenetv2-224": lambda channels, classes: mobilenet_v2(channels, classes, photographs=True),
    "mobilenetv2-full-224": lambda channels, classes: mobilenet_v2(channels, classes, divisor=1, photographs=True),
}

# The network of twice the width, the auxiliary network of HKD.
DOUBLES = {
    "resnet8-quarter": "resnet8-half",
    "resnet8-half": "resnet8",
    "resnet8x4": "resnet8x8",
    "resnet18-224": "wrn-18-2-224",
    "wrn-10-1": "wrn-10-2",
    "wrn-16-2": "wrn-16-4",
    "vgg8-eighth": "vgg8-quarter",
    "vgg8": "vgg8-double",
    "vgg13-eighth": "vgg13-quarter",
    "vgg13": "vgg13-double",
    "shufflenetv1-quarter": "shufflenetv1-half",
    "shufflenetv1": "shufflenetv1-double",
    "shufflenetv2-quarter": "shufflenetv2-half",
    "shufflenetv2": "shufflenetv2-double",
    "shufflenetv2-half-224": "shufflenetv2-224",
    "mobilenetv2-eighth": "mobilenetv2-quarter",
    "mobilenetv2": "mobilenetv2-full",
}


def build(name: str, in_channels: int, num_classes: int, size: int = 32) -> StagedNetwork | ForeignNetwork:
    """Return a network by name, or timm's or torchvision's with ``timm:NAME`` or ``torchvision:NAME``.

    Args:
        size: height and width of the images, which those libraries' networks are tried with.
    """
    if name.startswith(foreign.PREFIXES):
        return foreign.build(name, in_channels, num_classes, size)
    return NETWORKS[name](in_channels, num_classes)


def checked_name(name: str) -> str:
    """Return a name that ``build`` knows, or whose library knows whether it does."""
    if name not in NETWORKS and not name.startswith(foreign.PREFIXES):
        raise argparse.ArgumentTypeError(f"expected {', '.join(NETWORKS)}, timm:NAME or torchvision:NAME, got {name!r}")
    return name


def parameter_count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
