"""Linear classifiers on a network's features of another data set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import Dataset, Images
from .networks import StagedNetwork

DECAY, STEPS = 1e-4, 200  # of the classifier


@dataclass(frozen=True)
class Views:
    """Images of ``target`` as a network for images of ``source`` takes them."""

    source: Dataset
    target: Dataset
    device: torch.device

    def of(self, images: Images, size: int = 500) -> Iterator[Tensor]:
        """Yield images in the size, with the channels, and normalised as the images of the source."""
        channels, *sides = self.source.shape
        for start in range(0, len(images), size):
            pixels = self.target.pixels(images[start : start + size]).to(self.device).float()
            if list(pixels.shape[2:]) != sides:
                pixels = F.interpolate(pixels, sides, mode="bilinear", antialias=True)
            if pixels.shape[1] != channels:
                pixels = pixels.mean(1, keepdim=True).expand(-1, channels, -1, -1)
            yield self.source.normalise(pixels)


def views_like(source: Dataset, target: Dataset, device: torch.device) -> Views:
    return Views(source, target, device)


@torch.no_grad()
def features(network: StagedNetwork, views: Views, images: Images) -> Tensor:
    """Return the inputs of the network's classifier, n x channels."""
    return torch.cat([network.pool(network(batch)[1][-1]) for batch in views.of(images)])


def linear_accuracy(network: StagedNetwork, views: Views) -> float:
    """Return the test accuracy in percent of a linear classifier that L-BFGS trains on the frozen features.

    Features are divided by the deviation of each over the training images. The loss is cross-entropy with a small
    weight decay.
    """
    train, test = (features(network, views, images) for images in (views.target.train, views.target.test))
    mean, deviation = train.mean(0), train.std(0).clamp(min=1e-6)
    train, test = ((part - mean) / deviation for part in (train, test))
    labels = views.target.train.labels.to(train.device)
    weight = torch.zeros(views.target.num_classes, train.shape[1] + 1, device=train.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=STEPS, line_search_fn="strong_wolfe")

    def logits(inputs: Tensor) -> Tensor:
        return F.linear(inputs, weight[:, :-1], weight[:, -1])

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(logits(train), labels) + DECAY * weight[:, :-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    found = logits(test).argmax(1).cpu() == views.target.test.labels
    return 100 * found.float().mean().item()
