"""Local correlation consistency in plain PyTorch, equation by equation: the specification of ``local_correlation``."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import checks
from ...types import RELATIONS, Relation


def correlation(rows: Tensor, positions: int, relation: Relation) -> Tensor:
    """Return the cosine correlations (Eq. 3) of unit patch vectors. Row i * positions + p is patch p of image i."""
    cells = rows.view(-1, positions, rows.shape[1])
    if relation == "intra":
        return cells @ cells.transpose(1, 2)
    if relation == "inter_same":
        by_position = cells.transpose(0, 1)
        return by_position @ by_position.transpose(1, 2)
    full = rows @ rows.T
    if relation == "full":
        return full
    index = torch.arange(rows.shape[0], device=rows.device)
    image, position = index // positions, index % positions
    related = (image[:, None] == image) | (position[:, None] == position)
    return full.masked_fill(related, 0)


def pairs(images: int, positions: int) -> tuple[int, int, int]:
    """Return the number of pairs in the sums of Eqs. 4, 5 and 6."""
    return images * positions**2, positions * images**2, images * (images - 1) * positions * (positions - 1)


def local_correlation_loss(
    student: Tensor, teacher: Tensor, positions: int, weights: tuple[float, float, float], mean: bool
) -> Tensor:
    """Return Eqs. 4-7 on unit patch vectors. ``mean`` divides each sum by its pairs. A weight of 0 skips
    its relation.
    """
    loss = 0 * (student.sum() + teacher.sum())  # differentiable, and NaN stays NaN, even if every relation is skipped
    counts = pairs(student.shape[0] // positions, positions)
    for relation, weight, count in zip(RELATIONS[1:], weights, counts, strict=True):
        if count and checks.holds(weight != 0):
            difference = correlation(student, positions, relation) - correlation(teacher, positions, relation)
            loss = loss + (weight / count if mean else weight) * difference.square().sum()
    return loss
