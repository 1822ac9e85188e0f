"""Triton kernels of ``gram``: every layer's depth is cut into parts. One launch sums the parts of all layers of one
dtype. A second launch adds them in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..grouped import number, pointer
from ..operator import in_triton
from ..shapes import accumulation_dtype
from ..tuning import GRAM_FOLD as FOLD
from ..tuning import GRAM_PROGRAMS as PROGRAMS
from ..tuning import GRAM_TILES as TILES
from . import fake


class Layer(NamedTuple):
    """A layer as a matrix. Column k is at ``Σ stride · digit``, where the digits of k count to ``sizes``."""

    features: Tensor
    place: int  # among all layers
    depth: int
    sizes: tuple[int, int]
    strides: tuple[int, int, int]


def _layer(features: Tensor, place: int) -> Layer:
    axes: list[tuple[int, int]] = []
    for size, stride in zip(features.shape[1:], features.stride()[1:], strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = axes[-1][0] * size, stride
        else:
            axes.append((size, stride))
    if len(axes) > 3:  # more dimensions than a map
        return _layer(features.flatten(1), place)
    (_, outer), (middle_size, middle), (inner_size, inner) = [(1, 0)] * (3 - len(axes)) + axes
    depth = features.shape[1:].numel()
    return Layer(features, place, depth, (middle_size, inner_size), (outer, middle, inner))


def _by_dtype(features: Sequence[Tensor], computed: torch.dtype) -> list[list[Layer]]:
    groups: dict[torch.dtype, list[Layer]] = {}
    for place, layer in enumerate(features):
        # Triton cannot multiply half-precision numbers in float64.
        readable = layer.float() if computed == torch.float64 and layer.element_size() == 2 else layer
        groups.setdefault(layer.dtype, []).append(_layer(readable, place))
    return list(groups.values())


def _columns(layers: list[Layer]) -> dict[str, Any]:
    """Return the arguments that kernels need to read the layers."""
    return {
        "layers": tuple(layer.features for layer in layers),
        "depths": tuple(layer.depth for layer in layers),
        "rows": tuple(layer.features.stride(0) for layer in layers),
        "middle_sizes": tuple(layer.sizes[0] for layer in layers),
        "inner_sizes": tuple(layer.sizes[1] for layer in layers),
        "outer": tuple(layer.strides[0] for layer in layers),
        "middle": tuple(layer.strides[1] for layer in layers),
        "inner": tuple(layer.strides[2] for layer in layers),
        "EVEN": all(layer.sizes[1] == layer.depth for layer in layers),
        "COUNT": len(layers),
    }


def _starts(layers: list[Layer], length: int) -> tuple[int, ...]:
    """Return the index of every layer's first block of ``length`` columns, and the number of all blocks."""
    starts = [0]
    for layer in layers:
        starts.append(starts[-1] + triton.cdiv(layer.depth, length))
    return tuple(starts)


def _precision(dtype: torch.dtype, tf32: bool) -> str:
    """Return full float32 precision unless PyTorch allows less. Products of half precision are always exact."""
    return "tf32" if tf32 and dtype == torch.float32 and not torch.version.hip else "ieee"


@in_triton(fake.gram)
def _launch(features: list[Tensor], tf32: bool = False) -> Tensor:
    return multiply(features, tf32)


def multiply(features: Sequence[Tensor], tf32: bool) -> Tensor:
    """Return F Fᵀ of every layer F."""
    batch, dtype = features[0].shape[0], accumulation_dtype(*features)
    result = features[0].new_empty((len(features), batch, batch), dtype=dtype)
    total = sum(layer.shape[1:].numel() for layer in features)
    for layers in _by_dtype(features, dtype):
        block, depth, warps = TILES[dtype if dtype == torch.float64 else layers[0].features.dtype]
        tiles = triton.cdiv(batch, block)
        length = triton.cdiv(triton.cdiv(total, max(1, PROGRAMS // tiles**2)), 32) * 32
        starts = _starts(layers, length)
        whole = starts[-1] == len(layers) == len(features)  # each layer is one part
        parts = result if whole else result.new_empty((starts[-1], batch, batch))
        with torch.cuda.device_of(result):
            _gram_kernel[(starts[-1], tiles, tiles)](
                **_columns(layers),
                starts=starts,
                parts=parts,
                batch=batch,
                length=length,
                PRECISION=_precision(layers[0].features.dtype, tf32),
                UPCAST=triton.knobs.runtime.interpret,
                BLOCK=block,
                DEPTH=depth,
                num_warps=warps,
            )
            if whole:
                continue
            _fold_parts_kernel[(len(layers), triton.cdiv(batch * batch, FOLD))](
                parts,
                result,
                starts=starts,
                places=tuple(layer.place for layer in layers),
                size=batch * batch,
                COUNT=len(layers),
                BLOCK=FOLD,
            )
    return result


@in_triton(fake.gram_backward)
def _launch_backward(grad_matrices: Tensor, features: list[Tensor], tf32: bool = False) -> list[Tensor]:
    slopes = (grad_matrices + grad_matrices.mT).contiguous()
    # The interpreter truncates to bfloat16, and a GPU rounds.
    held = {layer.dtype: slopes.dtype if triton.knobs.runtime.interpret else layer.dtype for layer in features}
    grads = [layer.new_empty((layer.shape[0], layer.shape[1:].numel()), dtype=held[layer.dtype]) for layer in features]
    apply(slopes, features, grads, tf32)
    return [grad.to(layer.dtype) for grad, layer in zip(grads, features, strict=True)]


def apply(slopes: Tensor, features: Sequence[Tensor], grads: Sequence[Tensor], tf32: bool) -> None:
    """Write S F of every layer to ``grads``. S has the symmetric b x b slopes of the layer's matrix."""
    batch = slopes.shape[1]
    block, depth, warps = TILES[slopes.dtype]
    for layers in _by_dtype(features, slopes.dtype):
        starts = _starts(layers, block)
        with torch.cuda.device_of(slopes):
            _gram_backward_kernel[(starts[-1], triton.cdiv(batch, block))](
                **_columns(layers),
                starts=starts,
                places=tuple(layer.place for layer in layers),
                slopes=slopes,
                grads=tuple(grads[layer.place] for layer in layers),
                batch=batch,
                PRECISION=_precision(slopes.dtype, tf32),
                BLOCK=block,
                DEPTH=depth,
                num_warps=warps,
            )


@triton.jit
def _owner(starts, block, COUNT: tl.constexpr):
    """Return the layer of a block."""
    layer = tl.full((), 0, tl.int32)
    for i in tl.static_range(1, COUNT):
        layer += (block >= starts[i]).to(tl.int32)
    return layer


@triton.jit
def _column_offsets(k, middle_size, inner_size, outer, middle, inner, EVEN: tl.constexpr):
    if EVEN:
        return k * inner
    rest = k // inner_size
    return rest // middle_size * outer + rest % middle_size * middle + k % inner_size * inner


@triton.jit
def _gram_kernel(
    layers,
    depths,
    rows,
    middle_sizes,
    inner_sizes,
    outer,
    middle,
    inner,
    starts,
    parts,
    batch,
    length,
    EVEN: tl.constexpr,
    COUNT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    dtype: tl.constexpr = parts.dtype.element_ty
    part = tl.program_id(0)
    layer = _owner(starts, part, COUNT)
    features = pointer(layers, layer, COUNT)
    row = number(rows, layer, COUNT)
    middle_size, inner_size = number(middle_sizes, layer, COUNT), number(inner_sizes, layer, COUNT)
    steps = number(outer, layer, COUNT), number(middle, layer, COUNT), number(inner, layer, COUNT)
    begin = (part - number(starts, layer, COUNT)) * length
    end = tl.minimum(begin + length, number(depths, layer, COUNT))
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    j = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    acc = tl.zeros((BLOCK, BLOCK), dtype)
    for first in range(begin, end, DEPTH):
        k = first + tl.arange(0, DEPTH)
        columns = _column_offsets(k, middle_size, inner_size, steps[0], steps[1], steps[2], EVEN)
        inside = k < end
        a = tl.load(
            features + i[:, None] * row + columns[None, :], mask=(i < batch)[:, None] & inside[None, :], other=0
        )
        b = tl.load(
            features + j[None, :] * row + columns[:, None], mask=(j < batch)[None, :] & inside[:, None], other=0
        )
        if UPCAST or dtype == tl.float64:
            a = a.to(dtype)
            b = b.to(dtype)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=dtype)
    place = parts + part.to(tl.int64) * batch * batch + i[:, None] * batch + j[None, :]
    tl.store(place, acc, mask=(i < batch)[:, None] & (j < batch)[None, :])


@triton.jit
def _fold_parts_kernel(parts, result, starts, places, size, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    layer = tl.program_id(0)
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    inside = entry < size
    total = tl.zeros((BLOCK,), parts.dtype.element_ty)
    for part in range(number(starts, layer, COUNT), number(starts, layer + 1, COUNT + 1)):
        total += tl.load(parts + part * size + entry, mask=inside, other=0)
    tl.store(result + number(places, layer, COUNT) * size + entry, total, mask=inside)


@triton.jit
def _gram_backward_kernel(
    layers,
    depths,
    rows,
    middle_sizes,
    inner_sizes,
    outer,
    middle,
    inner,
    starts,
    places,
    slopes,
    grads,
    batch,
    EVEN: tl.constexpr,
    COUNT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Compute a tile of S F, with S = dA + dAᵀ."""
    dtype: tl.constexpr = slopes.dtype.element_ty
    block = tl.program_id(0)
    layer = _owner(starts, block, COUNT)
    features = pointer(layers, layer, COUNT)
    out = pointer(grads, layer, COUNT)
    row, depth = number(rows, layer, COUNT), number(depths, layer, COUNT)
    slopes += number(places, layer, COUNT) * batch * batch
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    k = (block - number(starts, layer, COUNT)) * BLOCK + tl.arange(0, BLOCK)
    columns = _column_offsets(
        k,
        number(middle_sizes, layer, COUNT),
        number(inner_sizes, layer, COUNT),
        number(outer, layer, COUNT),
        number(middle, layer, COUNT),
        number(inner, layer, COUNT),
        EVEN,
    )
    acc = tl.zeros((BLOCK, BLOCK), dtype)
    for first in range(0, batch, DEPTH):
        j = first + tl.arange(0, DEPTH).to(tl.int64)
        s = tl.load(slopes + i[:, None] * batch + j[None, :], mask=(i < batch)[:, None] & (j < batch)[None, :], other=0)
        f = tl.load(
            features + j[:, None] * row + columns[None, :], mask=(j < batch)[:, None] & (k < depth)[None, :], other=0
        )
        acc = tl.dot(s, f.to(dtype), acc, input_precision=PRECISION, out_dtype=dtype)
    place = out + i[:, None] * depth + k[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=(i < batch)[:, None] & (k < depth)[None, :])
