"""Triton kernels of ``rkd``: squared distances from differences, and the angles of all triples without a b³ tensor.

A loss of b rows has b³ angles. One kernel has a program per tile of pairs (i, k), which loops over the anchors j. It
sums the loss and the slopes of ‖x_i − x_k‖². Another kernel has a program per anchor and tile of i, which loops over k
and sums the slopes of ‖x_i − x_j‖². Everything is in float64, because differences of distances cancel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operator import full_precision, in_triton
from ..shapes import accumulation_dtype
from ..tuning import RKD_COLUMNS, RKD_TILE
from . import fake


@in_triton(fake.rkd)
def _launch(
    student: Tensor,
    teacher: Tensor,
    distance_weight: float,
    angle_weight: float,
    grad_student: bool,
    grad_teacher: bool,
) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(student, teacher)
    batch = len(student)
    wanted = grad_student, grad_teacher
    with torch.cuda.device_of(student), full_precision(student.device):
        squares_s, squares_t = (_squares(rows) for rows in (student, teacher))
        loss, slopes = _compare_distances(squares_s, squares_t, distance_weight)
        if angle_weight:
            total, *of_angles = _compare_angles(squares_s, squares_t, wanted)
            loss = loss + angle_weight / batch**3 * total
            for own, of_angle in zip(slopes, of_angles, strict=True):
                own.add_(of_angle, alpha=angle_weight / batch**3)
        gradients = [
            _gradient(rows, own).to(dtype) if want else rows.new_empty(0, dtype=dtype)
            for rows, own, want in zip((student, teacher), slopes, wanted, strict=True)
        ]
    return loss.to(dtype), *gradients


def _squares(rows: Tensor) -> Tensor:
    """Return ‖x_i − x_j‖² of all pairs, b x b in float64."""
    batch, columns = rows.shape
    squares = rows.new_empty(batch, batch, dtype=torch.float64)
    across = triton.cdiv(batch, RKD_TILE)
    _squares_kernel[(across**2,)](rows, squares, *rows.stride(), batch, columns, RKD_TILE, RKD_COLUMNS)
    return squares


def _compare_distances(squares_s: Tensor, squares_t: Tensor, weight: float) -> tuple[Tensor, list[Tensor]]:
    """Return the distance term, and its slopes with respect to the squared distances of each network."""
    pairs = squares_s.numel()
    distances = torch.stack([squares_s, squares_t]).sqrt()
    apart = distances != 0  # NaN counts as not 0
    counts = apart.sum((1, 2), keepdim=True).clamp(min=1)
    means = distances.sum((1, 2), keepdim=True) / counts
    means = torch.where(means != 0, means, 1)
    relative = distances / means
    difference = relative[0] - relative[1]
    size = difference.abs()
    loss = torch.where(size < 1, difference.square() / 2, size - 0.5).sum()
    slope = difference.clamp(-1, 1)
    slope = torch.stack([slope, -slope])
    through_means = (slope * relative).sum((1, 2), keepdim=True) / counts
    slopes = (weight / pairs) * (slope - through_means) / (2 * means * torch.where(apart, distances, torch.inf))
    return weight / pairs * loss, list(slopes)


def _compare_angles(squares_s: Tensor, squares_t: Tensor, wanted: tuple[bool, bool]) -> tuple[Tensor, ...]:
    """Return the sum over all angles, and its slopes with respect to the squared distances of each network."""
    batch = len(squares_s)
    across = triton.cdiv(batch, RKD_TILE)
    partials = squares_s.new_empty(across**2)
    opposite, adjacent = squares_s.new_empty(2, 2, batch, batch)
    _angles_kernel[(across**2,)](squares_s, squares_t, opposite, partials, batch, any(wanted), RKD_TILE)
    if any(wanted):
        _sides_kernel[(batch * across,)](squares_s, squares_t, adjacent, batch, RKD_TILE)
    else:
        opposite.zero_()
        adjacent.zero_()
    return partials.sum(), *(opposite + adjacent)


def _gradient(rows: Tensor, slopes: Tensor) -> Tensor:
    """Return 2 Σ_j (w_ij + w_ji)(x_i − x_j) for slopes w of the squared distances. A row has no slope to itself."""
    values = rows.double().contiguous()
    both = 2 * (slopes + slopes.T)
    return both.sum(1, keepdim=True) * values - both @ values


@triton.jit
def _squares_kernel(
    rows_ptr, squares_ptr, row_stride, stride, batch, columns, TILE: tl.constexpr, COLUMNS: tl.constexpr
):
    across = tl.cdiv(batch, TILE)
    i = (tl.program_id(0) // across * TILE + tl.arange(0, TILE)).to(tl.int64)
    j = (tl.program_id(0) % across * TILE + tl.arange(0, TILE)).to(tl.int64)
    total = tl.zeros((TILE, TILE), tl.float64)
    for start in range(0, columns, COLUMNS):
        column = (start + tl.arange(0, COLUMNS)).to(tl.int64)
        valid = (column < columns)[None, :]
        mine = tl.load(
            rows_ptr + i[:, None] * row_stride + column[None, :] * stride, mask=(i < batch)[:, None] & valid, other=0
        )
        others = tl.load(
            rows_ptr + j[:, None] * row_stride + column[None, :] * stride, mask=(j < batch)[:, None] & valid, other=0
        )
        difference = mine.to(tl.float64)[:, None, :] - others.to(tl.float64)[None, :, :]
        total += tl.sum(difference * difference, 2)
    tl.store(squares_ptr + i[:, None] * batch + j[None, :], total, mask=(i < batch)[:, None] & (j < batch)[None, :])


@triton.jit
def _inverse(squares):
    """Return 1 / distance, and 0 between equal rows."""
    apart = squares != 0
    return tl.where(apart, 1 / tl.sqrt(tl.where(apart, squares, 1.0)), 0.0)


@triton.jit
def _slope(difference):
    return tl.where(difference > 1, 1.0, tl.where(difference < -1, -1.0, difference))


@triton.jit
def _angles_kernel(
    squares_s_ptr, squares_t_ptr, slopes_ptr, partials_ptr, batch, SLOPES: tl.constexpr, TILE: tl.constexpr
):
    across = tl.cdiv(batch, TILE)
    i = (tl.program_id(0) // across * TILE + tl.arange(0, TILE)).to(tl.int64)
    k = (tl.program_id(0) % across * TILE + tl.arange(0, TILE)).to(tl.int64)
    inside = (i < batch)[:, None] & (k < batch)[None, :]
    place = i[:, None] * batch + k[None, :]
    opposite_s = tl.load(squares_s_ptr + place, mask=inside, other=0)
    opposite_t = tl.load(squares_t_ptr + place, mask=inside, other=0)
    total = tl.zeros((TILE, TILE), tl.float64)
    slopes_s = tl.zeros((TILE, TILE), tl.float64)
    slopes_t = tl.zeros((TILE, TILE), tl.float64)
    for anchor in range(batch):
        offset = tl.cast(anchor, tl.int64) * batch
        i_s = tl.load(squares_s_ptr + offset + i, mask=i < batch, other=0)
        k_s = tl.load(squares_s_ptr + offset + k, mask=k < batch, other=0)
        i_t = tl.load(squares_t_ptr + offset + i, mask=i < batch, other=0)
        k_t = tl.load(squares_t_ptr + offset + k, mask=k < batch, other=0)
        lengths_s = _inverse(i_s)[:, None] * _inverse(k_s)[None, :] / 2
        lengths_t = _inverse(i_t)[:, None] * _inverse(k_t)[None, :] / 2
        cosine_s = (i_s[:, None] + k_s[None, :] - opposite_s) * lengths_s
        difference = cosine_s - (i_t[:, None] + k_t[None, :] - opposite_t) * lengths_t
        size = tl.abs(difference)
        total += tl.where(size < 1, difference * difference / 2, size - 0.5)
        if SLOPES:
            slope = _slope(difference)
            slopes_s -= slope * lengths_s
            slopes_t += slope * lengths_t
    tl.store(partials_ptr + tl.program_id(0), tl.sum(tl.where(inside, total, 0)))
    if SLOPES:
        tl.store(slopes_ptr + place, slopes_s, mask=inside)
        tl.store(slopes_ptr + tl.cast(batch, tl.int64) * batch + place, slopes_t, mask=inside)


@triton.jit
def _sides_kernel(squares_s_ptr, squares_t_ptr, slopes_ptr, batch, TILE: tl.constexpr):
    across = tl.cdiv(batch, TILE)
    anchor = (tl.program_id(0) // across).to(tl.int64) * batch
    i = (tl.program_id(0) % across * TILE + tl.arange(0, TILE)).to(tl.int64)
    i_s = tl.load(squares_s_ptr + anchor + i, mask=i < batch, other=0)
    i_t = tl.load(squares_t_ptr + anchor + i, mask=i < batch, other=0)
    inverse_s, inverse_t = _inverse(i_s), _inverse(i_t)
    slopes_s = tl.zeros((TILE,), tl.float64)
    slopes_t = tl.zeros((TILE,), tl.float64)
    for start in range(0, batch, TILE):
        k = (start + tl.arange(0, TILE)).to(tl.int64)
        inside = (i < batch)[:, None] & (k < batch)[None, :]
        place = i[:, None] * batch + k[None, :]
        k_s = tl.load(squares_s_ptr + anchor + k, mask=k < batch, other=0)
        k_t = tl.load(squares_t_ptr + anchor + k, mask=k < batch, other=0)
        opposite_s = tl.load(squares_s_ptr + place, mask=inside, other=0)
        opposite_t = tl.load(squares_t_ptr + place, mask=inside, other=0)
        lengths_s = inverse_s[:, None] * _inverse(k_s)[None, :]
        lengths_t = inverse_t[:, None] * _inverse(k_t)[None, :]
        cosine_s = (i_s[:, None] + k_s[None, :] - opposite_s) / 2 * lengths_s
        cosine_t = (i_t[:, None] + k_t[None, :] - opposite_t) / 2 * lengths_t
        slope = tl.where(inside, _slope(cosine_s - cosine_t), 0)
        # Angle (k, j, i) is angle (i, j, k), so every slope counts twice.
        slopes_s += tl.sum(slope * (lengths_s - cosine_s * (inverse_s * inverse_s)[:, None]), 1)
        slopes_t -= tl.sum(slope * (lengths_t - cosine_t * (inverse_t * inverse_t)[:, None]), 1)
    tl.store(slopes_ptr + anchor + i, slopes_s, mask=i < batch)
    tl.store(slopes_ptr + tl.cast(batch, tl.int64) * batch + anchor + i, slopes_t, mask=i < batch)
