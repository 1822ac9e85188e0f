"""What one would write for local correlation consistency without kdkernels: the baselines of the measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Eager code and torch.compile are measured on both.
__all__ = ["full_gram", "textbook"]


def textbook(student: Sequence[Tensor], teacher: Sequence[Tensor], k: int) -> Tensor:
    """Eqs. 4-6 one after the other, as the paper states them, summed over stages (Eq. 7)."""
    return sum(_three_relations(unit_patches(s, k), unit_patches(t, k)) for s, t in zip(student, teacher, strict=True))


def full_gram(student: Sequence[Tensor], teacher: Sequence[Tensor], k: int) -> Tensor:
    """With equal weights Eqs. 4-6 are all pairs of patches, and the diagonal, which Eqs. 4 and 5 share, once more."""
    loss = 0.0
    for s, t in zip(student, teacher, strict=True):
        x, y = unit_patches(s, k).flatten(0, 1), unit_patches(t, k).flatten(0, 1)
        difference = x @ x.T - y @ y.T
        loss = loss + difference.square().sum() + difference.diagonal().square().sum()
    return loss


def unit_patches(features: Tensor, k: int) -> Tensor:
    """n x c x h x w features as n x k² x d vectors of norm 1."""
    n, c, h, w = features.shape
    if h % k or w % k:
        h, w = k * math.ceil(h / k), k * math.ceil(w / k)
        features = F.interpolate(features, size=(h, w), mode="bilinear", align_corners=False)
    cells = features.reshape(n, c, k, h // k, k, w // k).permute(0, 2, 4, 1, 3, 5)
    return F.normalize(cells.reshape(n, k * k, -1), dim=2)


def _three_relations(x: Tensor, y: Tensor) -> Tensor:
    def squared_difference(a: Tensor, b: Tensor) -> Tensor:
        return (a @ a.mT - b @ b.mT).square()

    n, positions, _ = x.shape
    intra = squared_difference(x, y).sum()
    inter_same = squared_difference(x.transpose(0, 1), y.transpose(0, 1)).sum()
    pairs = squared_difference(x.flatten(0, 1), y.flatten(0, 1)).view(n, positions, n, positions)
    other_image = ~torch.eye(n, dtype=torch.bool, device=x.device)[:, None, :, None]
    other_position = ~torch.eye(positions, dtype=torch.bool, device=x.device)[None, :, None, :]
    inter_diff = (pairs * (other_image & other_position)).sum()
    return intra + inter_same + inter_diff
