"""Teachers of timm and torchvision, as networks that return logits and the maps of their stages."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from kdkernels.nn import FeatureCapture

STAGES = 4
PREFIXES = ("timm:", "torchvision:")


class ForeignNetwork(nn.Module):
    """A convolutional network from elsewhere. Its stages end where the map becomes smaller; the last four count.

    The weights and their names are the model's own.
    """

    def __init__(self, model: nn.Module, in_channels: int, size: int) -> None:
        super().__init__()
        self.model = model
        image = torch.zeros(1, in_channels, size, size)
        layers = _last_of_each_size(model, image)
        self.channels = tuple(layers.values())
        self.layers = tuple(f"model.{name}" for name in layers)
        with torch.no_grad():
            self.eval()(image)  # a map that the network overwrites raises here
        self.train()

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        # Hooks of this call only: the network is pickled for other processes.
        with FeatureCapture(self, self.layers) as capture:
            logits = self.model(images)
            return logits, list(capture.features)

    def pool(self, features: Tensor) -> Tensor:
        return features.mean((2, 3))


def build(name: str, in_channels: int, num_classes: int, size: int) -> ForeignNetwork:
    """Return the network ``timm:NAME`` or ``torchvision:NAME`` without trained weights.

    Raises:
        ValueError: if the library is not installed, does not have the network, or the network has no stages of maps.
    """
    library, _, model = name.partition(":")
    make = {"timm": _of_timm, "torchvision": _of_torchvision}[library]
    try:
        return ForeignNetwork(make(model, in_channels, num_classes), in_channels, size)
    except ImportError as error:
        raise ValueError(f"{name} needs {library}, which is not installed: pip install {library}") from error
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{name} cannot be built for images of {size} x {size}: {error}") from error


def weights_file(name: str) -> Path:
    """Return a file of trained weights. ``torchvision:NAME`` is torchvision's file of ImageNet in PyTorch's cache.

    Raises:
        ValueError: if torchvision does not have such weights, or the file is not there. Nothing is downloaded.
    """
    library, _, model = name.partition(":")
    if library != "torchvision":
        return Path(name)
    try:
        url = importlib.import_module("torchvision").models.get_model_weights(model)["IMAGENET1K_V1"].url
    except (ImportError, RuntimeError) as error:  # also one of another version of PyTorch
        raise ValueError(f"{name} needs torchvision, which cannot be imported: {error}") from error
    except (KeyError, ValueError) as error:
        raise ValueError(f"torchvision has no weights of ImageNet for {model}: {error}") from error
    file = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not file.exists():
        raise ValueError(f"{name} needs the file {file}: download it from {url}")
    return file


def _of_timm(name: str, in_channels: int, num_classes: int) -> nn.Module:
    timm = importlib.import_module("timm")
    return timm.create_model(name, pretrained=False, in_chans=in_channels, num_classes=num_classes)


def _of_torchvision(name: str, in_channels: int, num_classes: int) -> nn.Module:
    if in_channels != 3:
        raise ValueError(f"torchvision's networks take images with 3 channels, got {in_channels}")
    models = importlib.import_module("torchvision").models
    return models.get_model(name, weights=None, num_classes=num_classes)


@torch.no_grad()
def _last_of_each_size(model: nn.Module, image: Tensor) -> dict[str, int]:
    """Return the names and widths of the layers that end the stages. Layers inside a block do not count."""
    shapes: dict[str, tuple[int, ...]] = {}  # of all maps, in the order of execution

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and output.dim() == 4 and min(output.shape[2:]) > 1:
                shapes[name] = tuple(output.shape)

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    try:
        model.eval()(image)
    finally:
        for hook in hooks:
            hook.remove()
    blocks = {name for name in shapes if not isinstance(model.get_submodule(name), nn.Sequential)}
    ends: dict[int, tuple[str, int]] = {}  # by the number of pixels
    for name, (_, width, height, breadth) in shapes.items():
        parts, pixels = name.split("."), height * breadth
        inside = any(".".join(parts[:i]) in blocks for i in range(1, len(parts)))
        if not inside and pixels <= min(ends, default=pixels):
            ends[pixels] = name, width
    if len(ends) < 2:
        raise ValueError("its maps of shape (n, c, h, w) have fewer than two sizes above one pixel")
    return dict(list(ends.values())[-STAGES:])
