"""Vision transformers for small images (Dosovitskiy et al. 2021), with averaged tokens in place of a class token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Width, depth and heads.
VITS = {"vit-small": (96, 4, 4), "vit-tiny": (32, 2, 2)}


class VisionTransformer(nn.Module):
    """A transformer of patches. It returns the logits, and the tokens after each block, n x positions x width."""

    def __init__(self, shape: tuple[int, ...], classes: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        channels, height, breadth = shape
        patch = next(side for side, largest in ((2, 15), (4, 32), (8, 96), (16, height)) if height <= largest)
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn((height // patch) * (breadth // patch), width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        tokens = self.patches(images).flatten(2).mT + self.positions
        layers = []
        for block in self.blocks:
            tokens = block(tokens)
            layers.append(tokens)
        return self.classifier(self.norm(tokens).mean(1)), layers


def vit(name: str, shape: tuple[int, ...], classes: int) -> VisionTransformer:
    return VisionTransformer(shape, classes, *VITS[name])
