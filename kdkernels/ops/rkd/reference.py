"""Relational knowledge distillation in plain PyTorch, a few anchors at a time: the specification of ``rkd``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ...native import accumulation_dtype
from ..autograd import recomputed

CHUNK = 2**22  # elements of the anchors x b x d differences and anchors x b x b angles that are held at once


def rkd(student: Tensor, teacher: Tensor, distance_weight: float, angle_weight: float) -> Tensor:
    """Weighted sum of the smooth L1 distances between two networks' relative distances and between their angles."""
    batch = student.shape[0]
    squares_s, squares_t = (_squared_distances(rows.double()) for rows in (student, teacher))
    loss = distance_weight * F.smooth_l1_loss(_relative_distances(squares_s), _relative_distances(squares_t))
    angles = [recomputed(_angle_difference, anchors, squares_s, squares_t) for anchors in _chunks(batch, batch)]
    return (loss + angle_weight * sum(angles) / batch**3).to(accumulation_dtype(student, teacher))


def _squared_distances(rows: Tensor) -> Tensor:
    """‖x_i − x_j‖² from the differences themselves: equal rows are at distance 0, close ones as far as they are."""

    def from_anchors(anchors: slice) -> Tensor:
        return (rows[anchors, None] - rows).square().sum(2)

    return torch.cat([recomputed(from_anchors, a) for a in _chunks(*rows.shape)])


def _relative_distances(squares: Tensor) -> Tensor:
    """Distances over the mean of those that are not 0; NaN counts among them."""
    apart = squares != 0
    distances = torch.where(apart, torch.where(apart, squares, 1).sqrt(), 0)
    mean = distances.sum() / apart.sum().clamp(min=1)
    return distances / torch.where(mean != 0, mean, 1)


def _angle_difference(anchors: slice, squares_s: Tensor, squares_t: Tensor) -> Tensor:
    return F.smooth_l1_loss(_cosines(anchors, squares_s), _cosines(anchors, squares_t), reduction="sum")


def _cosines(anchors: slice, squares: Tensor) -> Tensor:
    """The cosine of the angle at x_j between x_i and x_k, for every anchor j; 0 where one of them lies on it.

    ⟨x_i − x_j, x_k − x_j⟩ is half of ‖x_i − x_j‖² + ‖x_k − x_j‖² − ‖x_i − x_k‖²: no differences are needed for it.
    """
    sides = squares[anchors]
    apart = sides != 0
    inverse = torch.where(apart, torch.where(apart, sides, 1).rsqrt(), 0)
    products = (sides[:, :, None] + sides[:, None] - squares) / 2
    return products * (inverse[:, :, None] * inverse[:, None])


def _chunks(batch: int, width: int) -> Iterator[slice]:
    """Anchors, so many at a time that CHUNK elements of anchors x b x width suffice; all while torch.export traces."""
    if isinstance(batch, torch.SymInt):
        return iter([slice(0, batch)])
    step = max(1, CHUNK // (batch * width))
    return (slice(begin, begin + step) for begin in range(0, batch, step))
