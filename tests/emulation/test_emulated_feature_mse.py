"""``feature_mse`` in CUDA, emulated, against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from helpers import DTYPES, assert_matches, loss_and_gradients
from torch import Tensor

import kdkernels

from . import build


def draw(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def check(projected: list[Tensor], targets: list[Tensor], weights: Tensor | None = None) -> None:
    """Check one student layer, or as many as the weights have."""
    count = len(projected)
    if weights is None:
        weights = torch.rand(len(projected[0]), 1, count, requires_grad=True)

    def run(*leaves: Tensor, backend: str = "native") -> Tensor:
        rows = weights.shape[1]
        nested = [nest(leaves[:count], rows), nest(leaves[count:-1], rows)]
        return 0.7 * kdkernels.cross_layer_mse(*nested, leaves[-1], backend=backend)

    leaves = [*projected, *targets, weights]
    assert_matches(run, lambda *x: run(*x, backend="reference"), *leaves)


def nest(maps: Sequence[Tensor], rows: int) -> list[list[Tensor]]:
    columns = len(maps) // rows
    return [list(maps[row * columns :][:columns]) for row in range(rows)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
def test_sizes(order: str, dtype: torch.dtype, channels_last: bool) -> None:
    """Maps have equal and different sizes. Some can be read four numbers at a time. Some are larger than the share of a
    block.

    Without rounding up, no block's share of the first map would be a multiple of four.
    """
    projected = draw((2, 3, 6, 6), (2, 5, 2, 3), (2, 2, 6, 5), (2, 1, 1, 1), (2, 5, 16, 16), dtype=dtype)
    targets = draw((2, 3, 6, 6), (2, 5, 4, 6), (2, 2, 4, 3), (2, 1, 1, 1), (2, 5, 16, 16), dtype=dtype)
    if channels_last:
        projected, targets = (
            [x.detach().to(memory_format=torch.channels_last).requires_grad_() for x in maps]
            for maps in (projected, targets)
        )
    check(projected, targets)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 8])
def test_averaging_of_either_map(size: int) -> None:
    """Even and uneven ratios, where the target is larger along one axis and the projection along the other."""
    check(draw((2, 3, size, 8), (2, 2, 8, 8)), draw((2, 3, 8, size), (2, 2, size, size)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.mT.contiguous().mT,
        lambda x: torch.cat([x, x], 3)[:, :, :, 2 : 2 + x.shape[3]],
        lambda x: torch.cat([x, x], 1)[:, 1 : 1 + x.shape[1]],
        lambda x: torch.cat([x, x], 1).to(memory_format=torch.channels_last)[:, 1 : 1 + x.shape[1]],
        lambda x: x[:1].expand(x.shape),
    ],
    ids=["NHWC", "batch inside", "transposed", "columns", "channels", "NHWC, channels", "one sample"],
)
def test_strides(dtype: torch.dtype, view: Callable[[Tensor], Tensor]) -> None:
    """Strided maps on one side, on the other side, and on both."""
    maps = [x.detach() for x in draw((3, 4, 6, 5), (3, 4, 4, 2), (3, 4, 3, 5), (3, 4, 4, 2), dtype=dtype)]
    weights = torch.rand(2, 3, 1).transpose(0, 1).requires_grad_()
    for changed in (slice(0, 2), slice(2, 4), slice(0, 4)):
        leaves = list(maps)
        leaves[changed] = [view(x) for x in maps[changed]]
        leaves = [x.requires_grad_() for x in leaves]
        check(leaves[:2], leaves[2:], weights)


def test_mixed_dtypes() -> None:
    projected = [x for dtype in DTYPES for x in draw(*[(2, 3, 4, 4)] * 4, dtype=dtype)]
    targets = [x for _ in DTYPES for dtype in DTYPES for x in draw((2, 3, 4, 4), dtype=dtype)]
    weights = torch.rand(2, 4, 4, dtype=torch.float64, requires_grad=True)
    check(projected, targets, weights)


@pytest.mark.parametrize("wanted", range(1, 8))
def test_gradients_where_wanted(wanted: int) -> None:
    projected, targets = draw((3, 5, 4, 4), (3, 5, 2, 2)), draw((3, 5, 4, 4), (3, 5, 4, 4))
    weights = torch.rand(3, 2, 1, requires_grad=True)
    for bit, leaves in enumerate((projected, targets, [weights])):
        for leaf in leaves:
            leaf.requires_grad_(bool(wanted >> bit & 1))
    check(projected, targets, weights)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", range(3))
def test_nan_and_inf(value: float, where: int) -> None:
    leaves = [torch.randn(2, 5, 4, 4), torch.randn(2, 5, 8, 8), torch.rand(2, 1, 1)]
    leaves[where].view(-1)[-1] = value
    assert not kdkernels.cross_layer_mse([[leaves[0]]], [[leaves[1]]], leaves[2], backend="native").isfinite()


@pytest.mark.parametrize(("side", "launches"), [(2, 1), (8, 2)])
def test_launches(side: int, launches: int) -> None:
    """All pairs together take as many launches as one pair. Only averaged projections need another launch."""
    teachers = [torch.randn(2, 3, 4, 4), torch.randn(2, 3, 8, 8)]
    projected = [draw((2, 3, side, side), (2, 3, side, side)) for _ in range(3)]
    loss = kdkernels.cross_layer_mse(projected, [teachers] * 3, torch.rand(2, 3, 2), backend="native")
    assert build.launches() == 2
    loss.backward()
    assert build.launches() == launches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_where_no_vector_begins(dtype: torch.dtype) -> None:
    size = 2 * 3 * 4 * 4
    maps = (torch.randn(1 + size).to(dtype)[1:].view(2, 3, 4, 4).requires_grad_() for _ in range(2))
    check([next(maps)], draw((2, 3, 4, 4), dtype=dtype))
    check(draw((2, 3, 4, 4), dtype=dtype), [next(maps)])


def test_many_pairs() -> None:
    check(draw(*[(2, 2, 3, 2)] * 35), draw(*[(2, 2, 2, 4)] * 35))


def test_reruns_are_bitwise_equal_whatever_the_order() -> None:
    leaves = [*draw((2, 33, 8, 8), (2, 5, 9, 5), (2, 33, 8, 8), (2, 5, 4, 8)), torch.rand(2, 1, 2, requires_grad=True)]
    results = []
    for order in build.ORDERS:
        build.set_order(order)
        results.append(
            loss_and_gradients(lambda *x: kdkernels.cross_layer_mse([x[:2]], [x[2:4]], x[4], backend="native"), *leaves)
        )
    for loss, gradients in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(map(torch.equal, gradients, results[0][1]))
