"""Feature maps to unit patch vectors, in plain PyTorch: the specification of ``patches``."""

from __future__ import annotations

from itertools import pairwise

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
    """Return maps multiplied by the mask (Eq. 9), cropped to its box, and resampled to the original size."""
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


def split_first(features: Tensor, k: int, mask: Tensor | None, threshold: float | None) -> Tensor:
    """Return the map whose exact split into k x k cells follows the paper: cut the box into patches, then resize each
    patch.

    The box of an image is ``mask > threshold``, or the whole map. Its side of L pixels is cut at ⌊L·p/k⌋, and every
    patch, of at least one pixel, is resampled bilinearly to ⌈h/k⌉ x ⌈w/k⌉ by its own pixels only.

    Returns:
        n x c x k·⌈h/k⌉ x k·⌈w/k⌉ in float32 (float64 for float64 features).
    """
    maps = features.to(torch.promote_types(features.dtype, torch.float32))
    height, width = maps.shape[-2:]
    sides = [
        (maps.new_zeros(len(maps), dtype=torch.int64), maps.new_full((len(maps),), size, dtype=torch.int64))
        for size in (height, width)
    ]
    if mask is not None:
        mask = mask.to(torch.promote_types(mask.dtype, torch.float32))
        maps = masked_crop(maps, mask, None)
        if threshold is not None:
            top, bottom, left, right = bounding_boxes(mask, threshold, height, width)
            sides = [(top, bottom), (left, right)]
    for dim, (start, end) in enumerate(sides, 2):
        size = -(-maps.shape[dim] // k)
        cuts = [start + (end - start) * p // k for p in range(k + 1)]
        cells = [resample(maps, a, torch.maximum(b, a + 1), dim, size) for a, b in pairwise(cuts)]
        maps = torch.cat(cells, dim)
    return maps


def bounding_boxes(mask: Tensor, threshold: float, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the tight half-open bounds (top, bottom, left, right) of ``mask > threshold`` per image.

    If a mask never exceeds the threshold, the bounds are the whole map. NaN counts as exceeding it, so NaN is never
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


def resample(maps: Tensor, start: Tensor, end: Tensor, dim: int, size: int | None = None) -> Tensor:
    """Resample ``[start, end)`` of ``dim`` to ``size`` pixels per image, bilinearly (align_corners=False).

    ``size`` is by default the size of ``dim``.
    """
    size = size or maps.shape[dim]
    length = (end - start)[:, None]
    position = torch.arange(size, device=maps.device, dtype=maps.dtype) + 0.5
    source = (position * (length.to(maps.dtype) / size) - 0.5).clamp(min=0)
    low = source.to(torch.int64)
    high = torch.minimum(low + 1, length - 1)
    shape = [maps.shape[0], 1, 1, 1]
    shape[dim] = size
    fraction = (source - low).view(shape)

    def gather(index: Tensor) -> Tensor:
        whole = [*maps.shape[:dim], size, *maps.shape[dim + 1 :]]
        return maps.gather(dim, (index + start[:, None]).view(shape).expand(whole))

    return gather(low) * (1 - fraction) + gather(high) * fraction


def resize_to_multiple(maps: Tensor, k: int) -> Tensor:
    """Resample to the next size that ``k`` divides, bilinearly (align_corners=False)."""
    size = tuple(-(-side // k) * k for side in maps.shape[-2:])
    return maps if size == tuple(maps.shape[-2:]) else F.interpolate(maps, size=size, mode="bilinear")


def split(maps: Tensor, k: int) -> Tensor:
    """Return n x c x h x w maps as n*k*k x c*(h/k)*(w/k) rows. Row i*k*k + p is patch p of image i."""
    n, c, h, w = maps.shape
    cells = maps.reshape(n, c, k, h // k, k, w // k)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(n * k * k, c * (h // k) * (w // k))


def unit_rows(rows: Tensor, eps: float) -> Tensor:
    """Divide each row by its norm; a row of norm <= eps becomes the zero vector, with gradient 0."""
    # Rows relative to their largest entry have squares within range.
    largest = rows.detach().abs().amax(1, keepdim=True)
    rows = rows / largest.masked_fill(largest == 0, 1)
    dead = largest * torch.linalg.vector_norm(rows.detach(), dim=1, keepdim=True) <= eps
    # Rows of norm <= eps are replaced before the division, so that derivatives of every order are finite.
    rows = rows.masked_fill(dead, 1)
    unit: Tensor = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return unit.masked_fill(dead, 0)
