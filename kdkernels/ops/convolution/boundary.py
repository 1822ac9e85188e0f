"""What ``convolution`` and ``convolution_weight`` expect of their arguments."""

from __future__ import annotations

from torch import Tensor

from ...boundary import FULL_FLOATS, Check


def check_convolution(maps: Tensor, weight: Tensor, transposed: bool) -> None:
    check = Check("convolution")
    _channels_last(check, "maps", maps, "n c h w")
    check.tensor("weight", weight, "c k 3 3" if transposed else "k c 3 3", FULL_FLOATS)
    check.same_type("weight", weight, "maps", maps)
    outputs = weight.shape[1 if transposed else 0]
    _channels(check, "weight", outputs)
    check.fits("weight", maps.shape[0], outputs, *maps.shape[2:])


def check_convolution_weight(maps: Tensor, grad: Tensor) -> None:
    check = Check("convolution_weight")
    _channels_last(check, "maps", maps, "n c h w")
    _channels_last(check, "grad", grad, "n k h w")
    check.same_type("grad", grad, "maps", maps)
    check.fits("grad", grad.shape[1], maps.shape[1], 9)


def _channels_last(check: Check, name: str, maps: Tensor, shape: str) -> None:
    check.tensor(name, maps, shape, FULL_FLOATS)
    _channels(check, name, maps.shape[1])
    strides = ", ".join(map(str, maps.stride()))
    check.require(
        maps.stride(1) == 1,
        lambda: f"{name} must be channels_last, with stride 1 between channels, got strides ({strides})",
    )


def _channels(check: Check, name: str, count: int) -> None:
    check.require(count % 32 == 0, lambda: f"{name} must have a multiple of 32 channels, got {count}")
