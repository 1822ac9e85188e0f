"""Triton kernels of ``patches``: mask, crop, resample, split and normalise in one kernel, and the backward pass.

The patch grid is the map after crop, stretch, and resize to a multiple of k. This is linear in the map, and separable
in height and width. Along one axis, a pixel of the grid reads at most four pixels: two for the resize, and two for the
crop behind each. The kernels compute them from the bounds of the crop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..operator import in_triton
from ..shapes import accumulation_dtype, map_shape, new_like
from ..tuning import PATCHES_RESAMPLED_BLOCK as RESAMPLED_BLOCK
from ..tuning import PATCHES_ROW_BLOCK as ROW_BLOCK
from . import fake


@in_triton(fake.patches)
def _launch(
    features: Tensor, k: int, mask: Tensor | None, threshold: float | None, resize: bool, eps: float
) -> tuple[Tensor, Tensor]:
    mask, bounds, resize = _resampling(mask, threshold, features.shape[-2:], k, resize, features.dtype)
    dtype = accumulation_dtype(features)
    length = features.shape[1] * math.prod(-(-side // k) for side in features.shape[-2:])
    rows = features.new_empty((features.shape[0] * k * k, length), dtype=dtype)
    norms = features.new_empty(len(rows), dtype=dtype)
    n, c, h, w = features.shape
    with torch.cuda.device_of(features):
        _pack_kernel[(n * k * k,)](
            features,
            _or(mask, rows),
            _or(bounds, rows),
            rows,
            norms,
            *features.stride(),
            *_strides(mask),
            n,
            c,
            h,
            w,
            eps,
            K=k,
            PATCH_HEIGHT=-(-h // k),
            PATCH_WIDTH=-(-w // k),
            MASK=mask is not None,
            CROP=bounds is not None,
            RESIZE=resize,
            CHANNELS_LAST=map_shape(features)[3],  # as the backward kernel will be told
            **_launch_options(rows.shape[1], RESAMPLED_BLOCK if resize or bounds is not None else ROW_BLOCK),
        )
    return rows, norms


@in_triton(fake.patches_backward)
def _launch_backward(
    grad_rows: Tensor,
    rows: Tensor,
    norms: Tensor,
    shape: list[int],
    k: int,
    mask: Tensor | None,
    threshold: float | None,
    resize: bool,
) -> Tensor:
    c, h, w, channels_last = shape
    n = rows.shape[0] // k**2
    mask, bounds, resize = _resampling(mask, threshold, (h, w), k, resize, rows.dtype)
    result = new_like(rows, (n, c, h, w), channels_last)
    patch_height, patch_width = -(-h // k), -(-w // k)
    resampled = bounds is not None or resize
    # Every pixel of the patch grid belongs to one patch. Without resampling, the grid is the map.
    grid = result
    if resampled:
        grid = new_like(rows, (n, c, k * patch_height, k * patch_width), channels_last)
    with torch.cuda.device_of(rows):
        _project_kernel[(n * k * k,)](
            grad_rows,
            rows,
            norms,
            _or(mask, rows),
            grid,
            *grad_rows.stride(),
            *_strides(mask),
            *grid.stride(),
            c,
            K=k,
            PATCH_HEIGHT=patch_height,
            PATCH_WIDTH=patch_width,
            MASK=mask is not None and not resampled,
            CHANNELS_LAST=channels_last,
            **_launch_options(rows.shape[1], ROW_BLOCK),
        )
        if resampled:
            _resample_backward_kernel[(n * triton.cdiv(c * h * w, RESAMPLED_BLOCK),)](
                grid,
                _or(mask, rows),
                _or(bounds, rows),
                result,
                *grid.stride(),
                *_strides(mask),
                *result.stride(),
                n,
                c,
                h,
                w,
                *grid.shape[-2:],
                MASK=mask is not None,
                CROP=bounds is not None,
                RESIZE=resize,
                CHANNELS_LAST=channels_last,
                BLOCK=RESAMPLED_BLOCK,
            )
    return result


def _resampling(
    mask: Tensor | None, threshold: float | None, size: Sequence[int], k: int, resize: bool, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None, bool]:
    """Return the mask at the features' size, the bounds of its boxes, and whether the map has to be resized."""
    height, width = size
    resize = resize and bool(height % k or width % k)
    bounds = None
    if mask is not None:
        mask = mask.to(torch.promote_types(dtype, torch.float32))
        if threshold is not None:
            bounds = _bounding_boxes(mask, threshold, height, width)
        if mask.shape[-2:] != (height, width):
            mask = F.interpolate(mask[:, None], size=(height, width), mode="bilinear")[:, 0]
    # the kernels compute the positions of pixels in int32
    if (resize or bounds is not None) and max(size) + k >= 2**15:
        raise ValueError(f"Triton resamples maps of sides below {2**15} - k, got {tuple(size)}")
    return mask, bounds, resize


def _bounding_boxes(mask: Tensor, threshold: float, height: int, width: int) -> Tensor:
    n, h, w = mask.shape
    bounds = mask.new_empty((4, n), dtype=torch.int32)
    with torch.cuda.device_of(mask):
        _bounds_kernel[(n,)](mask, bounds, *mask.stride(), n, h, w, height, width, threshold, BLOCK=1024)
    return bounds


def _or(optional: Tensor | None, stand_in: Tensor) -> Tensor:
    """Return a kernel's pointer argument, or a stand-in that is not read."""
    return stand_in if optional is None else optional


def _strides(mask: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if mask is None else mask.stride()


def _launch_options(length: int, largest: int) -> dict[str, int]:
    block = min(triton.next_power_of_2(length), largest)
    return {"BLOCK": block, "num_warps": max(1, min(block // (largest // 8), 8))}


@triton.jit
def _bounds_kernel(
    mask_ptr,
    bounds_ptr,
    image_stride,
    y_stride,
    x_stride,
    n,
    h,
    w,
    height,
    width,
    threshold: tl.float64,
    BLOCK: tl.constexpr,
):
    """Find an image's box as in ``reference.bounding_boxes``: top, bottom, left and right on a height x width map."""
    image = tl.program_id(0).to(tl.int64)
    mask_ptr += image * image_stride
    threshold = tl.full((), threshold, mask_ptr.dtype.element_ty)
    top = tl.full((), h, tl.int32)
    left = tl.full((), w, tl.int32)
    bottom = tl.full((), 0, tl.int32)
    right = tl.full((), 0, tl.int32)
    for start in range(0, h * w, BLOCK):
        pixel = start + tl.arange(0, BLOCK)
        y = pixel // w
        x = pixel % w
        offsets = y.to(tl.int64) * y_stride + x.to(tl.int64) * x_stride
        below = tl.load(mask_ptr + offsets, mask=pixel < h * w, other=-float("inf")) <= threshold
        above = (below == 0) & (pixel < h * w)
        top = tl.minimum(top, tl.min(tl.where(above, y, h), 0))
        left = tl.minimum(left, tl.min(tl.where(above, x, w), 0))
        bottom = tl.maximum(bottom, tl.max(tl.where(above, y + 1, 0), 0))
        right = tl.maximum(right, tl.max(tl.where(above, x + 1, 0), 0))
    nothing = bottom == 0
    bounds_ptr += image
    tl.store(bounds_ptr, tl.where(nothing, 0, top * height // h))
    tl.store(bounds_ptr + n, tl.where(nothing, height, tl.cdiv(bottom * height, h)))
    tl.store(bounds_ptr + 2 * n, tl.where(nothing, 0, left * width // w))
    tl.store(bounds_ptr + 3 * n, tl.where(nothing, width, tl.cdiv(right * width, w)))


@triton.jit
def _components(offsets, c, PATCH_HEIGHT: tl.constexpr, PATCH_WIDTH: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Return (channel, y, x) of a patch's components, in memory order."""
    if CHANNELS_LAST:
        pixel = offsets // c
        return offsets % c, pixel // PATCH_WIDTH, pixel % PATCH_WIDTH
    pixel = offsets // PATCH_WIDTH
    return pixel // PATCH_HEIGHT, pixel % PATCH_HEIGHT, offsets % PATCH_WIDTH


@triton.jit
def _bounds(bounds_ptr, image, n, h, w, CROP: tl.constexpr):
    """Return for height and width: the start of an image's crop, its length, and the length of the map."""
    if CROP:
        top = tl.load(bounds_ptr + image)
        bottom = tl.load(bounds_ptr + n + image)
        left = tl.load(bounds_ptr + 2 * n + image)
        right = tl.load(bounds_ptr + 3 * n + image)
        return (top, bottom - top, h), (left, right - left, w)
    return (0, h, h), (0, w, w)


@triton.jit
def _stretch(position, length, size, dtype: tl.constexpr):
    """Return the two pixels that a pixel reads, and their weights, if ``length`` pixels are resampled bilinearly to
    ``size``.
    """
    # (position + 1/2) * length / size - 1/2 in integers. If the result is an integer, nothing may come from the next
    # pixel, which may be larger by any factor.
    whole = 2 * tl.cast(size, tl.int32)
    source = tl.maximum((2 * position + 1) * length - size, 0)
    low = source // whole
    fraction = (source % whole).to(dtype) / whole.to(dtype)
    return low, tl.minimum(low + 1, length - 1), 1 - fraction, fraction


@triton.jit
def _taps(position, bounds, grid_size, CROP: tl.constexpr, RESIZE: tl.constexpr, dtype: tl.constexpr):
    """Return the four pixels that ``position`` of the patch grid reads along one axis, and their weights.

    Without a resize or without a crop, only the first two count. Without both, only the first.
    """
    start, length, size = bounds
    low, high = position, position
    low_weight = tl.full(position.shape, 1, dtype)
    high_weight = low_weight
    if RESIZE:
        low, high, low_weight, high_weight = _stretch(position, size, grid_size, dtype)
    if CROP:
        a, b, a_weight, b_weight = _stretch(low, length, size, dtype)
        c, d, c_weight, d_weight = _stretch(high, length, size, dtype)
        weights = (low_weight * a_weight, low_weight * b_weight, high_weight * c_weight, high_weight * d_weight)
        return (start + a, start + b, start + c, start + d), weights
    return (low, high, low, high), (low_weight, high_weight, low_weight, high_weight)


@triton.jit
def _read(
    features_ptr,
    mask_ptr,
    channel,
    y,
    x,
    inside,
    strides,
    mask_strides,
    MASK: tl.constexpr,
    dtype: tl.constexpr,
    bounds,
    grid,
    CROP: tl.constexpr,
    RESIZE: tl.constexpr,
):
    """Return pixels of the masked, cropped and resized map of one image."""
    TAPS: tl.constexpr = (2 if CROP else 1) * (2 if RESIZE else 1)
    ys, y_weights = _taps(y, bounds[0], grid[0], CROP, RESIZE, dtype)
    xs, x_weights = _taps(x, bounds[1], grid[1], CROP, RESIZE, dtype)
    features_ptr += channel.to(tl.int64) * strides[0]
    result = tl.zeros(channel.shape, dtype)
    for i in tl.static_range(TAPS):
        for j in tl.static_range(TAPS):
            row = ys[i].to(tl.int64)
            column = xs[j].to(tl.int64)
            value = tl.load(features_ptr + row * strides[1] + column * strides[2], mask=inside, other=0).to(dtype)
            if MASK:
                value *= tl.load(mask_ptr + row * mask_strides[0] + column * mask_strides[1], mask=inside, other=0)
            result += value * (y_weights[i] * x_weights[j])
    return result


@triton.jit
def _pack_kernel(
    features_ptr,
    mask_ptr,
    bounds_ptr,
    rows_ptr,
    norms_ptr,
    image_stride,
    channel_stride,
    y_stride,
    x_stride,
    mask_image_stride,
    mask_y_stride,
    mask_x_stride,
    n,
    c,
    h,
    w,
    eps: tl.float64,
    K: tl.constexpr,
    PATCH_HEIGHT: tl.constexpr,
    PATCH_WIDTH: tl.constexpr,
    MASK: tl.constexpr,
    CROP: tl.constexpr,
    RESIZE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    image = row // (K * K)
    patch = (row % (K * K)).to(tl.int32)
    top = patch // K * PATCH_HEIGHT
    left = patch % K * PATCH_WIDTH
    length = c * (PATCH_HEIGHT * PATCH_WIDTH)
    features_ptr += image * image_stride
    mask_ptr += image * mask_image_stride
    rows_ptr += row * length
    strides = (channel_stride, y_stride, x_stride)
    mask_strides = (mask_y_stride, mask_x_stride)
    bounds = _bounds(bounds_ptr, image, n, h, w, CROP)
    grid = (K * PATCH_HEIGHT, K * PATCH_WIDTH)
    dtype: tl.constexpr = rows_ptr.dtype.element_ty

    # The patch is read twice, the second time from the cache, because a row may be longer than the registers hold.
    total = tl.full((), 0, tl.float64)
    for start in range(0, length, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < length
        channel, y, x = _components(offsets, c, PATCH_HEIGHT, PATCH_WIDTH, CHANNELS_LAST)
        values = _read(
            features_ptr, mask_ptr, channel, top + y, left + x, inside, strides, mask_strides, MASK, dtype,
            bounds, grid, CROP, RESIZE,
        )  # fmt: skip
        wide = values.to(tl.float64)
        total += tl.sum(wide * wide, 0)
    norm = tl.sqrt(total)
    dead = norm <= tl.full((), eps, tl.float64)
    tl.store(norms_ptr + row, tl.where(dead, 0, norm).to(dtype))
    # Scaled into range, because the norm of a float32 row may not be a normal float32.
    scale = tl.where(norm > 1e30, 1e-18, tl.where(norm < 1e-30, 1e18, 1.0))
    divisor = tl.where(dead, 1, norm * scale).to(dtype)
    scale = scale.to(dtype)

    for start in range(0, length, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < length
        channel, y, x = _components(offsets, c, PATCH_HEIGHT, PATCH_WIDTH, CHANNELS_LAST)
        values = _read(
            features_ptr, mask_ptr, channel, top + y, left + x, inside, strides, mask_strides, MASK, dtype,
            bounds, grid, CROP, RESIZE,
        )  # fmt: skip
        tl.store(rows_ptr + offsets, tl.where(dead, 0, values * scale / divisor), mask=inside)


@triton.jit
def _project_kernel(
    grad_ptr,
    rows_ptr,
    norms_ptr,
    mask_ptr,
    map_ptr,
    grad_row_stride,
    grad_stride,
    mask_image_stride,
    mask_y_stride,
    mask_x_stride,
    image_stride,
    channel_stride,
    y_stride,
    x_stride,
    c,
    K: tl.constexpr,
    PATCH_HEIGHT: tl.constexpr,
    PATCH_WIDTH: tl.constexpr,
    MASK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the gradient through the division by the norm, (g − x̂⟨g, x̂⟩) / ‖x‖, from patches to a map."""
    row = tl.program_id(0).to(tl.int64)
    image = row // (K * K)
    patch = (row % (K * K)).to(tl.int32)
    top = patch // K * PATCH_HEIGHT
    left = patch % K * PATCH_WIDTH
    length = c * (PATCH_HEIGHT * PATCH_WIDTH)
    rows_ptr += row * length
    grad_ptr += row * grad_row_stride
    map_ptr += image * image_stride
    mask_ptr += image * mask_image_stride

    norm = tl.load(norms_ptr + row)
    dead = norm == 0
    divisor = tl.where(dead, 1, norm)
    radial = tl.zeros_like(norm)
    for start in range(0, length, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < length
        unit = tl.load(rows_ptr + offsets, mask=inside, other=0)
        grad = tl.load(grad_ptr + offsets.to(tl.int64) * grad_stride, mask=inside, other=0)
        radial += tl.sum(unit * grad, 0)

    for start in range(0, length, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < length
        unit = tl.load(rows_ptr + offsets, mask=inside, other=0)
        grad = tl.load(grad_ptr + offsets.to(tl.int64) * grad_stride, mask=inside, other=0)
        value = tl.where(dead, 0, (grad - unit * radial) / divisor)
        channel, y, x = _components(offsets, c, PATCH_HEIGHT, PATCH_WIDTH, CHANNELS_LAST)
        channel, y, x = channel.to(tl.int64), (top + y).to(tl.int64), (left + x).to(tl.int64)
        if MASK:
            value *= tl.load(mask_ptr + y * mask_y_stride + x * mask_x_stride, mask=inside, other=0)
        tl.store(map_ptr + channel * channel_stride + y * y_stride + x * x_stride, value, mask=inside)


@triton.jit
def _reach(first, end, length, size, dtype: tl.constexpr):
    """Return the half-open range of ``size`` pixels that read ``[first, end)`` of the ``length`` pixels."""
    ratio = tl.cast(size, dtype) / tl.cast(length, dtype)
    low = tl.floor((first.to(dtype) - 0.5) * ratio - 0.5).to(tl.int32)
    high = tl.ceil((end.to(dtype) + 0.5) * ratio - 0.5).to(tl.int32)
    return tl.maximum(low, 0), tl.minimum(high, size)


@triton.jit
def _readers(pixel, bounds, grid_size, CROP: tl.constexpr, RESIZE: tl.constexpr, dtype: tl.constexpr):
    """Return the range of the patch grid that reads a pixel along one axis. It may have a few pixels more."""
    start, length, size = bounds
    low = pixel
    high = pixel + 1
    if CROP:
        cropped = pixel - start
        low, high = _reach(cropped, cropped + 1, length, size, dtype)
        high = tl.where((cropped >= 0) & (cropped < length), high, low)
    if RESIZE:
        empty = low >= high
        low, high = _reach(low, high, size, grid_size, dtype)
        high = tl.where(empty, low, high)
    return low, high


@triton.jit
def _weight(position, pixel, bounds, grid_size, CROP: tl.constexpr, RESIZE: tl.constexpr, dtype: tl.constexpr):
    """Return the weight of a pixel in ``position`` of the patch grid along one axis."""
    TAPS: tl.constexpr = (2 if CROP else 1) * (2 if RESIZE else 1)
    indices, weights = _taps(position, bounds, grid_size, CROP, RESIZE, dtype)
    result = tl.zeros(position.shape, dtype)
    for i in tl.static_range(TAPS):
        result += tl.where(indices[i] == pixel, weights[i], 0)
    return result


@triton.jit
def _resample_backward_kernel(
    map_ptr,
    mask_ptr,
    bounds_ptr,
    grad_ptr,
    image_stride,
    channel_stride,
    y_stride,
    x_stride,
    mask_image_stride,
    mask_y_stride,
    mask_x_stride,
    grad_image_stride,
    grad_channel_stride,
    grad_y_stride,
    grad_x_stride,
    n,
    c,
    h,
    w,
    grid_height,
    grid_width,
    MASK: tl.constexpr,
    CROP: tl.constexpr,
    RESIZE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum, for each pixel, the gradients of the grid pixels that read it."""
    blocks = tl.cdiv(c * h * w, BLOCK)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    offsets = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < c * h * w
    if CHANNELS_LAST:
        channel = offsets % c
        y = offsets // c // w
        x = offsets // c % w
    else:
        channel = offsets // w // h
        y = offsets // w % h
        x = offsets % w
    dtype: tl.constexpr = map_ptr.dtype.element_ty
    bounds = _bounds(bounds_ptr, image, n, h, w, CROP)
    top, bottom = _readers(y, bounds[0], grid_height, CROP, RESIZE, dtype)
    left, right = _readers(x, bounds[1], grid_width, CROP, RESIZE, dtype)

    map_ptr += image * image_stride + channel.to(tl.int64) * channel_stride
    result = tl.zeros(offsets.shape, dtype)
    for i in range(tl.max(bottom - top, 0)):
        grid_y = top + i
        y_weight = _weight(grid_y, y, bounds[0], grid_height, CROP, RESIZE, dtype)
        for j in range(tl.max(right - left, 0)):
            grid_x = left + j
            x_weight = _weight(grid_x, x, bounds[1], grid_width, CROP, RESIZE, dtype)
            value = tl.load(
                map_ptr + grid_y.to(tl.int64) * y_stride + grid_x.to(tl.int64) * x_stride,
                mask=inside & (grid_y < bottom) & (grid_x < right),
                other=0,
            )
            result += value * (y_weight * x_weight)
    mask_ptr += image * mask_image_stride
    grad_ptr += image * grad_image_stride + channel.to(tl.int64) * grad_channel_stride
    y, x = y.to(tl.int64), x.to(tl.int64)
    if MASK:
        result *= tl.load(mask_ptr + y * mask_y_stride + x * mask_x_stride, mask=inside, other=0)
    tl.store(grad_ptr + y * grad_y_stride + x * grad_x_stride, result, mask=inside)
