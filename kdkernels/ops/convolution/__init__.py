"""Convolutions with 1 x 1 or 3 x 3 weights and zero padding, without a bias, for SemCKD's projections.

PyTorch computes them, except 3 x 3 weights on a CPU. There, Winograd's algorithm needs 4 multiplications in place of 9.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from ...types import Backend
from ..operator import Operator
from . import fake, reference

CONVOLUTION = Operator(
    "convolution",
    kernels=(fake.convolution, fake.convolution_weight),
    native=("cpu",),
    triton=False,
    memory="a copy of maps that are not channels last",
)

SIDE = 64  # side of the blocks in csrc/cpu/convolution.cpp, which threads share
CHANNELS = 32  # it takes multiples of


def convolution(maps: Tensor, weight: Tensor, *, backend: Backend = "auto") -> Tensor:
    """n x k x h x w from n x c x h x w maps and k x c x 1 x 1 or k x c x 3 x 3 weights, outside of autograd."""
    if winograd(maps, weight, backend):
        result: Tensor = native.ops.convolution(_channels_last(maps), weight, False)
        return result
    return reference.convolution(maps, weight)


def convolution_backward(
    grad: Tensor, maps: Tensor, weight: Tensor, wanted: tuple[bool, bool], *, backend: Backend = "auto"
) -> tuple[Tensor | None, Tensor | None]:
    """Return the wanted gradients to maps and weights, from the gradient of the result."""
    if not winograd(maps, weight, backend):
        return reference.convolution_backward(grad, maps, weight, wanted)
    grad = _channels_last(grad)
    return (
        native.ops.convolution(grad, weight, True) if wanted[0] else None,
        native.ops.convolution_weight(_channels_last(maps), grad, not weight.is_contiguous()) if wanted[1] else None,
    )


def winograd(maps: Tensor, weight: Tensor, backend: Backend = "auto") -> bool:
    """Return whether the native kernel runs: it can, and every thread has a block of work."""
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
        and CONVOLUTION.choose(backend, maps) == "native"
    )


def _channels_last(maps: Tensor) -> Tensor:
    return maps.contiguous(memory_format=torch.channels_last)
