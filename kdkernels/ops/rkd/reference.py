"""Relational knowledge distillation in plain PyTorch, a few anchors at a time: the specification of ``rkd``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd import recomputed
from ..row_masks import pairs, to_mean, zeroed
from ..shapes import accumulation_dtype

CHUNK = 2**22  # elements of the anchors x b x d differences and anchors x b x b angles that are held together


def rkd(
    student: Tensor, teacher: Tensor, distance_weight: float, angle_weight: float, mask: Tensor | None = None
) -> Tensor:
    """Return the weighted sum of the smooth L1 distances between two networks' relative distances and between their
    angles, over the rows that the mask counts.
    """
    batch = student.shape[0]
    squares_s, squares_t = (_squared_distances(rows.double(), mask) for rows in (student, teacher))
    differences = F.smooth_l1_loss(_relative_distances(squares_s), _relative_distances(squares_t))
    loss = distance_weight * to_mean(differences, mask, power=2)
    angles = [recomputed(_angle_difference, anchors, squares_s, squares_t) for anchors in _chunks(batch, batch)]
    loss = loss + angle_weight * to_mean(sum(angles, torch.zeros_like(loss)) / batch**3, mask, power=3)
    return loss.to(accumulation_dtype(student, teacher))


def _squared_distances(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Return ‖x_i − x_j‖² from the differences, so that equal rows have distance 0 and close rows lose no digits.

    A row that does not count has distance 0 to every row, like an equal row, and so no distances and angles.
    """
    if mask is not None:
        (rows,) = zeroed(mask, (rows,))

    def from_anchors(anchors: slice) -> Tensor:
        return (rows[anchors, None] - rows).square().sum(2)

    squares = torch.cat([recomputed(from_anchors, a) for a in _chunks(*rows.shape)])
    return squares if mask is None else squares.masked_fill(~pairs(mask), 0)


def _relative_distances(squares: Tensor) -> Tensor:
    """Return distances divided by the mean of the distances that are not 0. NaN counts as not 0."""
    apart = squares != 0
    distances = torch.where(apart, torch.where(apart, squares, 1).sqrt(), 0)
    mean = distances.sum() / apart.sum().clamp(min=1)
    return distances / torch.where(mean != 0, mean, 1)


def _angle_difference(anchors: slice, squares_s: Tensor, squares_t: Tensor) -> Tensor:
    return F.smooth_l1_loss(_cosines(anchors, squares_s), _cosines(anchors, squares_t), reduction="sum")


def _cosines(anchors: slice, squares: Tensor) -> Tensor:
    """Return the cosine of the angle at x_j between x_i and x_k, for every anchor j. It is 0 if x_i or x_k equals x_j.

    ⟨x_i − x_j, x_k − x_j⟩ is half of ‖x_i − x_j‖² + ‖x_k − x_j‖² − ‖x_i − x_k‖², so no differences are needed.
    """
    sides = squares[anchors]
    apart = sides != 0
    inverse = torch.where(apart, torch.where(apart, sides, 1).rsqrt(), 0)
    products = (sides[:, :, None] + sides[:, None] - squares) / 2
    return products * (inverse[:, :, None] * inverse[:, None])


def _chunks(batch: int, width: int) -> Iterator[slice]:
    """Yield anchors, as many at a time as CHUNK elements of anchors x b x width allow. torch.export gets
    all at once.
    """
    if isinstance(batch, torch.SymInt):
        return iter([slice(0, batch)])
    step = max(1, CHUNK // (batch * width))
    return (slice(begin, begin + step) for begin in range(0, batch, step))
