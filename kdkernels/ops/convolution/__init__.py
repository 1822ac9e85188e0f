"""Convolutions by 1 x 1 or 3 x 3 weights over a border of zeros, without a bias: those of SemCKD's projections.

They are PyTorch's, but for 3 x 3 weights on a CPU: Winograd's algorithm multiplies 4 times where they do 9 times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends, native
from . import reference

SIDE = 64  # of the blocks in csrc/cpu/convolution.cpp, which threads share out
CHANNELS = 32  # it takes multiples of


def convolution(maps: Tensor, weight: Tensor, *, backend: str = "auto") -> Tensor:
    """n x k x h x w from n x c x h x w maps and k x c x 1 x 1 or k x c x 3 x 3 weights, outside of autograd."""
    if winograd(maps, weight, backend):
        return native.ops.convolution(_channels_last(maps), weight, False)
    return reference.convolution(maps, weight)


def convolution_backward(
    grad: Tensor, maps: Tensor, weight: Tensor, wanted: tuple[bool, bool], *, backend: str = "auto"
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of maps and weights that are wanted, from that of the result."""
    if not winograd(maps, weight, backend):
        return reference.convolution_backward(grad, maps, weight, wanted)
    grad = _channels_last(grad)
    return (
        native.ops.convolution(grad, weight, True) if wanted[0] else None,
        native.ops.convolution_weight(_channels_last(maps), grad, not weight.is_contiguous()) if wanted[1] else None,
    )


def winograd(maps: Tensor, weight: Tensor, backend: str = "auto") -> bool:
    """Whether the native kernel runs: where it can, and has a block of work for every thread."""
    k, c, *window = weight.shape
    n, _, h, w = maps.shape
    tiles = n * -(-h // 2) * -(-w // 2)
    tasks = -(-k // SIDE) * min(-(-c // SIDE), -(-tiles // SIDE))
    return (
        maps.device.type == "cpu"
        and maps.dtype == weight.dtype
        and maps.dtype in (torch.float32, torch.float64)
        and window == [3, 3]
        and c % CHANNELS == k % CHANNELS == 0
        and tiles >= SIDE
        and tasks >= torch.get_num_threads()
        and backends.choose(backend, maps, native_on=("cpu",)) == "native"
    )


def _channels_last(maps: Tensor) -> Tensor:
    return maps.contiguous(memory_format=torch.channels_last)
