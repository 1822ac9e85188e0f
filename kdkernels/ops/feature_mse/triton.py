"""Triton kernels of ``feature_mse``: one launch for the errors of all pairs and samples, one for the gradients of the
projected maps, one for the gradients of the targets. Maps are averaged while they are read, in both passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..grouped import number, pointer
from ..operator import in_triton
from ..shapes import accumulation_dtype, new_like
from ..tuning import FEATURE_MSE_BLOCK as BLOCK
from ..tuning import FEATURE_MSE_WARPS as WARPS
from . import fake


def _channels_last(maps: Tensor) -> bool:
    _, c, h, w = maps.shape
    return maps.stride(1) == 1 and c > 1 and h * w > 1


Pair = tuple[int, Tensor, Tensor]  # (index among all pairs, projected maps, target maps)


def _by_dtype(projected: Sequence[Tensor], targets: Sequence[Tensor], places: Sequence[int]) -> list[list[Pair]]:
    groups: dict[tuple[torch.dtype, torch.dtype], list[Pair]] = {}
    for place in places:
        own, target = projected[place], targets[place]
        groups.setdefault((own.dtype, target.dtype), []).append((place, own, target))
    return list(groups.values())


def _maps(pairs: list[Pair]) -> dict[str, Any]:
    """Return the arguments that kernels need to read the pairs."""
    places, projected, targets = zip(*pairs, strict=True)
    channels = tuple(p.shape[1] for p in projected)
    arguments: dict[str, Any] = {"places": places, "COUNT": len(pairs), "channels": channels}
    for name, maps in (("own", projected), ("target", targets)):
        arguments[name] = maps
        arguments[f"{name}_sizes"] = tuple(size for m in maps for size in m.shape[2:])
        arguments[f"{name}_strides"] = tuple(stride for m in maps for stride in m.stride())
    arguments["fastest"] = tuple(int(_channels_last(p)) for p in projected)
    return arguments


@in_triton(fake.feature_mse)
def _launch(projected: list[Tensor], targets: list[Tensor], weights: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(*projected, *targets)
    errors = weights.new_empty(weights.shape, dtype=dtype)
    batch, pairs = weights.shape[0], len(projected)
    for group in _by_dtype(projected, targets, range(pairs)):
        with torch.cuda.device_of(weights):
            _errors_kernel[(batch, len(group))](
                **_maps(group), errors=errors, pairs=pairs, scale=scale, BLOCK=BLOCK, num_warps=WARPS
            )
    return (weights.to(dtype) * errors).sum(), errors


@in_triton(fake.feature_mse_backward)
def _launch_backward(
    grad_loss: Tensor,
    projected: list[Tensor],
    targets: list[Tensor],
    weights: Tensor,
    scale: float,
    wanted: list[int],
) -> list[Tensor]:
    count, batch = len(projected), weights.shape[0]
    slopes = (2 * scale * grad_loss * weights.to(grad_loss.dtype)).contiguous()
    # The interpreter truncates to bfloat16, and a GPU rounds.
    held = grad_loss.dtype if triton.knobs.runtime.interpret else None
    grads = [
        new_like(maps, maps.shape, _channels_last(projected[g % count]), held) if want else maps.new_empty((0,))
        for g, (maps, want) in enumerate(zip([*projected, *targets], wanted, strict=True))
    ]
    for side, offset in ((False, 0), (True, count)):
        places = [p for p in range(count) if wanted[offset + p]]
        for group in _by_dtype(projected, targets, places):
            largest = max(grads[offset + place][0].numel() for place, *_ in group)
            with torch.cuda.device_of(weights):
                _gradient_kernel[(batch, len(group), triton.cdiv(largest, BLOCK))](
                    **_maps(group),
                    grads=tuple(grads[offset + place] for place, *_ in group),
                    slopes=slopes,
                    pairs=count,
                    OF_TARGET=side,
                    BLOCK=BLOCK,
                    num_warps=WARPS,
                )
    return [
        grad.to(maps.dtype) if want else grad
        for grad, maps, want in zip(grads, [*projected, *targets], wanted, strict=True)
    ]


@triton.jit
def _decode(element, channels, width, area, fastest):
    """Return channel, line and column of element indices. Columns change fastest, or channels if ``fastest`` is 1."""
    channel = tl.where(fastest == 1, element % channels, element // area)
    pixel = tl.where(fastest == 1, element // channels, element % area)
    return channel, pixel // width, pixel % width


@triton.jit
def _size(sizes, index, COUNT: tl.constexpr):
    """Return the elements of a sample. Indices have 32 bits, and memory offsets have 64 bits."""
    return number(sizes, index, COUNT).to(tl.int32)


@triton.jit
def _averaged(
    maps,
    strides,
    sample,
    pair,
    height,
    width,
    c,
    y,
    x,
    grid_height,
    grid_width,
    inside,
    COUNT: tl.constexpr,
    dtype: tl.constexpr,
):
    """Return the maps of a pair averaged down to the grid, at channels c, lines y and columns x."""
    maps += sample * number(strides, 4 * pair, 4 * COUNT) + c * number(strides, 4 * pair + 1, 4 * COUNT)
    line, pixel = number(strides, 4 * pair + 2, 4 * COUNT), number(strides, 4 * pair + 3, 4 * COUNT)
    top, bottom = y * height // grid_height, ((y + 1) * height + grid_height - 1) // grid_height
    left, right = x * width // grid_width, ((x + 1) * width + grid_width - 1) // grid_width
    total = tl.zeros(c.shape, dtype)
    tall = (height + grid_height - 1) // grid_height + (height % grid_height != 0).to(tl.int32)
    wide = (width + grid_width - 1) // grid_width + (width % grid_width != 0).to(tl.int32)
    for step in range(tall * wide):
        row, column = top + step // wide, left + step % wide
        mask = inside & (row < bottom) & (column < right)
        total += tl.load(maps + row * line + column * pixel, mask=mask, other=0).to(dtype)
    return total / ((bottom - top) * (right - left)).to(dtype)


@triton.jit
def _errors_kernel(
    own,
    own_sizes,
    own_strides,
    target,
    target_sizes,
    target_strides,
    places,
    channels,
    fastest,
    errors,
    pairs,
    scale: tl.float64,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = errors.dtype.element_ty
    sample, pair = tl.program_id(0).to(tl.int64), tl.program_id(1)
    own_maps, target_maps = pointer(own, pair, COUNT), pointer(target, pair, COUNT)
    own_height, own_width = _size(own_sizes, 2 * pair, 2 * COUNT), _size(own_sizes, 2 * pair + 1, 2 * COUNT)
    height, width = _size(target_sizes, 2 * pair, 2 * COUNT), _size(target_sizes, 2 * pair + 1, 2 * COUNT)
    grid_height, grid_width = tl.minimum(own_height, height), tl.minimum(own_width, width)
    c_count, order = _size(channels, pair, COUNT), _size(fastest, pair, COUNT)
    area = grid_height * grid_width
    total = tl.zeros((BLOCK,), dtype)
    for first in range(0, c_count * area, BLOCK):
        element = first + tl.arange(0, BLOCK)
        inside = element < c_count * area
        c, y, x = _decode(element, c_count, grid_width, area, order)
        a = _averaged(
            own_maps,
            own_strides,
            sample,
            pair,
            own_height,
            own_width,
            c,
            y,
            x,
            grid_height,
            grid_width,
            inside,
            COUNT,
            dtype,
        )
        b = _averaged(
            target_maps,
            target_strides,
            sample,
            pair,
            height,
            width,
            c,
            y,
            x,
            grid_height,
            grid_width,
            inside,
            COUNT,
            dtype,
        )
        total += tl.where(inside, (a - b) * (a - b), 0)
    error = tl.sum(total, 0) / (c_count * area).to(dtype) * tl.full((), scale, dtype)
    tl.store(errors + sample * pairs + number(places, pair, COUNT), error)


@triton.jit
def _gradient_kernel(
    own,
    own_sizes,
    own_strides,
    target,
    target_sizes,
    target_strides,
    places,
    channels,
    fastest,
    grads,
    slopes,
    pairs,
    OF_TARGET: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the gradient of every pixel: the shares of the windows that contain it, at most two along each axis."""
    dtype: tl.constexpr = slopes.dtype.element_ty
    sample, pair = tl.program_id(0).to(tl.int64), tl.program_id(1)
    own_maps, target_maps, grad = pointer(own, pair, COUNT), pointer(target, pair, COUNT), pointer(grads, pair, COUNT)
    own_height, own_width = _size(own_sizes, 2 * pair, 2 * COUNT), _size(own_sizes, 2 * pair + 1, 2 * COUNT)
    height, width = _size(target_sizes, 2 * pair, 2 * COUNT), _size(target_sizes, 2 * pair + 1, 2 * COUNT)
    grid_height, grid_width = tl.minimum(own_height, height), tl.minimum(own_width, width)
    c_count, order = _size(channels, pair, COUNT), _size(fastest, pair, COUNT)
    slope = tl.load(slopes + sample * pairs + number(places, pair, COUNT)) / (c_count * grid_height * grid_width).to(
        dtype
    )
    if OF_TARGET:
        rows, columns = height, width
        slope = -slope
    else:
        rows, columns = own_height, own_width
    element = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = element < c_count * rows * columns
    c, row, column = _decode(element, c_count, columns, rows * columns, order)
    first_y, last_y = row * grid_height // rows, ((row + 1) * grid_height - 1) // rows
    first_x, last_x = column * grid_width // columns, ((column + 1) * grid_width - 1) // columns
    total = tl.zeros((BLOCK,), dtype)
    wide = 1 + (columns % grid_width != 0).to(tl.int32)
    for step in range((1 + (rows % grid_height != 0).to(tl.int32)) * wide):
        y, x = first_y + step // wide, first_x + step % wide
        here = inside & (y <= last_y) & (x <= last_x)
        a = _averaged(
            own_maps,
            own_strides,
            sample,
            pair,
            own_height,
            own_width,
            c,
            y,
            x,
            grid_height,
            grid_width,
            here,
            COUNT,
            dtype,
        )
        b = _averaged(
            target_maps,
            target_strides,
            sample,
            pair,
            height,
            width,
            c,
            y,
            x,
            grid_height,
            grid_width,
            here,
            COUNT,
            dtype,
        )
        down_size = ((y + 1) * rows + grid_height - 1) // grid_height - y * rows // grid_height
        across_size = ((x + 1) * columns + grid_width - 1) // grid_width - x * columns // grid_width
        total += tl.where(here, slope * (a - b) / (down_size * across_size).to(dtype), 0)
    tl.store(grad + sample * (c_count * rows * columns) + element, total.to(grad.dtype.element_ty), mask=inside)
