"""Feature maps to unit patch vectors, in plain PyTorch: the specification of ``patches``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def patches(
    features: Tensor,
    k: int,
    mask: Tensor | None,
    threshold: float | None,
    partition: str,
    eps: float,
) -> Tensor:
    maps = features.to(torch.promote_types(features.dtype, torch.float32))
    if mask is not None:
        maps = masked_crop(maps, mask.to(torch.promote_types(mask.dtype, torch.float32)), threshold)
    if partition == "resize":
        maps = resize_to_multiple(maps, k)
    return unit_rows(split(maps, k), eps)


def masked_crop(maps: Tensor, mask: Tensor, threshold: float | None) -> Tensor:
    """Multiply by the mask (Eq. 9), crop to its box, resample to the original size."""
    height, width = maps.shape[-2:]
    box = None if threshold is None else bounding_boxes(mask, threshold, height, width)
    mask = mask.to(maps.dtype)
    if mask.shape[-2:] != maps.shape[-2:]:
        mask = F.interpolate(mask[:, None], size=(height, width), mode="bilinear")[:, 0]
    maps = maps * mask[:, None]
    if box is None:
        return maps
    top, bottom, left, right = box
    maps = resample(maps, top, bottom, dim=2)
    return resample(maps, left, right, dim=3)


def bounding_boxes(mask: Tensor, threshold: float, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tight half-open bounds (top, bottom, left, right) of ``mask > threshold``, one per image.

    A mask that nowhere exceeds the threshold gives the whole map; NaN counts as exceeding it, so that it is never
    cropped away. Bounds are scaled to a ``height`` x ``width`` map and widened to whole pixels.
    """
    above = ~(mask <= threshold)
    top, bottom = _bounds(above.any(2), height)
    left, right = _bounds(above.any(1), width)
    return top, bottom, left, right


def _bounds(inside: Tensor, size: int) -> tuple[Tensor, Tensor]:
    length = inside.shape[1]
    marks = inside.to(torch.int64)
    nothing = ~inside.any(1)
    first = marks.argmax(1).masked_fill(nothing, 0)
    end = (length - marks.flip(1).argmax(1)).masked_fill(nothing, length)
    return first * size // length, -(-end * size // length)


def resample(maps: Tensor, start: Tensor, end: Tensor, dim: int) -> Tensor:
    """Stretch ``[start, end)`` of ``dim`` over the whole of it, bilinearly (align_corners=False), image by image."""
    size = maps.shape[dim]
    length = (end - start)[:, None]
    position = torch.arange(size, device=maps.device, dtype=maps.dtype) + 0.5
    source = (position * (length.to(maps.dtype) / size) - 0.5).clamp(min=0)
    low = source.to(torch.int64)
    high = torch.minimum(low + 1, length - 1)
    shape = [maps.shape[0], 1, 1, 1]
    shape[dim] = size
    fraction = (source - low).view(shape)

    def gather(index: Tensor) -> Tensor:
        return maps.gather(dim, (index + start[:, None]).view(shape).expand_as(maps))

    return gather(low) * (1 - fraction) + gather(high) * fraction


def resize_to_multiple(maps: Tensor, k: int) -> Tensor:
    """Resample to the next size that ``k`` divides, bilinearly (align_corners=False)."""
    size = tuple(-(-side // k) * k for side in maps.shape[-2:])
    return maps if size == tuple(maps.shape[-2:]) else F.interpolate(maps, size=size, mode="bilinear")


def split(maps: Tensor, k: int) -> Tensor:
    """n x c x h x w to n*k*k x c*(h/k)*(w/k): row i*k*k + p is patch p of image i."""
    n, c, h, w = maps.shape
    cells = maps.reshape(n, c, k, h // k, k, w // k)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(n * k * k, c * (h // k) * (w // k))


def unit_rows(rows: Tensor, eps: float) -> Tensor:
    """Divide each row by its norm; a row of norm <= eps becomes the zero vector, with gradient 0."""
    # Relative to their largest entry, rows of any size have squares within range.
    largest = rows.detach().abs().amax(1, keepdim=True)
    rows = rows / largest.masked_fill(largest == 0, 1)
    dead = largest * torch.linalg.vector_norm(rows.detach(), dim=1, keepdim=True) <= eps
    # Dead rows are filled before the division, where derivatives of every order are finite.
    rows = rows.masked_fill(dead, 1)
    return (rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)).masked_fill(dead, 0)
