"""Winograd convolutions against PyTorch's in float64, and the conditions under which they run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor

from kdkernels import native
from kdkernels.ops.convolution import convolution, convolution_backward, winograd

needs_native = pytest.mark.skipif(
    native.why_not(torch.device("cpu")) is not None, reason=str(native.why_not(torch.device("cpu")))
)

ORDERS = (torch.contiguous_format, torch.channels_last)
SHAPES = [  # batch, channels in and out, height, width
    (64, 64, 128, 1, 1),
    (7, 96, 160, 5, 7),
    (3, 128, 96, 10, 9),
    (33, 64, 192, 2, 3),
    (1, 160, 128, 17, 16),
]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """The number of threads decides whether the native kernel runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def case(shape: tuple[int, ...], dtype: torch.dtype, order: torch.memory_format) -> tuple[Tensor, Tensor, Tensor]:
    """Return maps, weights and the gradient of the result."""
    n, c, k, h, w = shape
    maps, grad = torch.randn(n, c, h, w, dtype=dtype), torch.randn(n, k, h, w, dtype=dtype)
    weight = torch.randn(k, c, 3, 3, dtype=dtype)
    return tuple(x.contiguous(memory_format=order) for x in (maps, weight, grad))


@needs_native
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, order):
    maps, weight, grad = case(shape, dtype, order)
    assert winograd(maps, weight)
    doubles = [x.double().requires_grad_() for x in (maps, weight)]
    exact = F.conv2d(*doubles, padding=1)
    assert_close(convolution(maps, weight), exact)
    for ours, expected, leaf in zip(
        convolution_backward(grad, maps, weight, (True, True)),
        torch.autograd.grad(exact, doubles, grad.double()),
        (maps, weight),
        strict=True,
    ):
        assert ours.dtype == leaf.dtype
        assert_close(ours, expected, "gradient")
        assert leaf is maps or ours.stride() == leaf.stride()  # otherwise the optimizer step would be slow
    assert convolution_backward(grad, maps, weight, (False, False)) == (None, None)


@needs_native
def test_any_strides():
    maps, weight, grad = case((9, 96, 96, 6, 5), torch.float64, torch.contiguous_format)
    exact = convolution(maps, weight), *convolution_backward(grad, maps, weight, (True, True))
    wide = torch.randn(9, 100, 8, 7, dtype=torch.float64)
    wide[:, 3:99, 1:7, 2:] = maps
    maps, grad = wide[:, 3:99, 1:7, 2:], grad[:1].expand_as(grad)
    assert_close(convolution(maps, weight.mT.contiguous().mT), exact[0])
    assert_close(convolution_backward(grad, maps, weight, (True, False))[0][5], exact[1][0])


@needs_native
def test_not_a_number_stays_and_reruns_are_equal():
    maps, weight, grad = case((9, 96, 96, 6, 5), torch.float32, torch.channels_last)
    again = [(convolution(maps, weight), *convolution_backward(grad, maps, weight, (True, True))) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*again, strict=True))
    maps[4, 7, 2, 3] = torch.nan
    result = convolution(maps, weight)
    assert result[4, :, 1:4, 2:].isnan().all()
    assert result[[3, 5]].isfinite().all()
    assert convolution_backward(grad, maps, weight, (True, True))[1][:, 7].isnan().all()


def test_pytorch_where_it_cannot_run_or_would_be_slower():
    def runs(n=16, c=256, k=256, h=8, window=3, dtype=torch.float32, **settings) -> bool:
        return winograd(
            torch.empty(n, c, h, h, dtype=dtype), torch.empty(k, c, window, window, dtype=dtype), **settings
        )

    assert runs() is (native.why_not(torch.device("cpu")) is None)
    assert not runs(backend="reference")
    assert not runs(dtype=torch.bfloat16)
    assert not runs(window=1)
    assert not runs(c=260)
    assert not runs(k=250)
    assert not runs(n=15, h=4)  # 60 tiles
    torch.set_num_threads(3)
    assert not runs(c=64, k=128)  # two blocks of weights
