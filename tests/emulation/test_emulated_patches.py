"""``patches`` in CUDA, emulated, against the reference in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from helpers import DTYPES, HALF_DTYPES, assert_as_good_as, assert_close, exactly, loss_and_gradients
from torch import Tensor

from kdkernels import native
from kdkernels.ops.patches import patches
from kdkernels.ops.shapes import map_shape

from . import build


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Return the same values with other strides."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "permuted":
        return x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    return x


def native_rows(maps: Tensor, k: int, **settings: object) -> Tensor:
    """Return the rows with their components in the order of the reference, channel by channel."""
    rows = patches(maps, k, backend="native", **settings)
    if maps.stride(1) > 1 or settings.get("mask") is not None or settings.get("partition") == "resize":
        return rows
    return rows.unflatten(1, (-1, maps.shape[1])).transpose(1, 2).flatten(1)


def check(maps: Tensor, k: int, **settings: object) -> None:
    """Check the rows, and the gradient of a random sum of them."""
    of_reference = functools.partial(patches, k=k, backend="reference", **settings)
    of_native = functools.partial(native_rows, k=k, **settings)
    weight = torch.randn_like(of_reference(maps.double()))

    def run(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return (function(x).double() * weight).sum()

    half = maps.dtype in HALF_DTYPES
    rows, exact_rows = of_native(maps), of_reference(maps.double())
    if half:
        assert_as_good_as(rows, of_reference(maps.float()), exact_rows, "rows")
    else:
        assert_close(rows, exact_rows, "rows")
    maps.requires_grad_()
    _, (gradient,) = loss_and_gradients(lambda x: run(of_native, x), maps)
    _, (exact,) = loss_and_gradients(lambda x: run(of_reference, x), *exactly(maps))
    assert gradient.dtype == maps.dtype
    if half:
        _, (of_eager,) = loss_and_gradients(lambda x: run(of_reference, x.float()), maps)
        assert_as_good_as(gradient, of_eager, exact, "gradient")
    else:
        assert_close(gradient, exact, "gradient")


@pytest.mark.parametrize(("shape", "k"), [((1, 1, 1, 1), 1), ((3, 2, 4, 6), 2), ((2, 5, 6, 3), 3), ((1, 40, 8, 8), 1)])
def test_shapes(order: str, shape: tuple[int, ...], k: int) -> None:
    check(torch.randn(shape), k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
def test_dtypes_and_layouts(dtype: torch.dtype, layout: str) -> None:
    check(laid_out(torch.randn(2, 3, 4, 4).to(dtype), layout), 2)


@pytest.mark.parametrize("threshold", [None, 0.6, 2.0])
@pytest.mark.parametrize("mask_shape", [(7, 5), (3, 9)], ids=["of the maps' size", "of another"])
@pytest.mark.parametrize("partition", ["exact", "resize"])
def test_masks(order: str, threshold: float | None, mask_shape: tuple[int, int], partition: str) -> None:
    mask = torch.rand(3, *mask_shape)
    mask[1] *= 0.5  # an image without a box
    mask[2] = 0
    mask[2, 1, 2] = 0.9  # a box of one pixel
    check(
        torch.randn(3, 2, 7, 5) + 1,
        1 if partition == "exact" else 3,
        mask=mask,
        threshold=threshold,
        partition=partition,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mask_at_its_threshold_does_not_exceed_it(dtype: torch.dtype) -> None:
    """The comparison has the precision of the mask: 0.6 is larger in float32 than in float64."""
    mask = torch.full((2, 4, 6), 0.6, dtype=dtype)
    mask[:, 1:3, 2:] = 0.7
    check(torch.randn(2, 3, 4, 6), 2, mask=mask, threshold=0.6)


def test_resizing_alone() -> None:
    check(torch.randn(2, 3, 7, 4), 3, partition="resize")


def test_pixels_on_pixels_take_nothing_of_their_neighbours() -> None:
    """A crop of 7 pixels is resampled to 13. The middle pixel equals the middle of the crop, for any neighbours."""
    maps, mask = 1e6 * torch.randn(2, 1, 13, 13), torch.zeros(2, 13, 13)
    mask[:, 2:9, 5:12] = 1
    maps[0, :, 5, 8] = 0
    check(maps, 13, mask=mask, threshold=0.5)


def test_dead_tiny_and_huge_patches() -> None:
    maps = torch.randn(1, 2, 4, 4)
    maps[..., :2, :2] = 0
    maps[..., :2, 2:] *= 1e-33
    maps[..., 2:, :2] *= 1e33
    check(maps, 2, eps=0.0)
    leaf = maps.detach().requires_grad_()
    rows = patches(leaf, 2, eps=1e-8, backend="native")
    assert (rows[:2] == 0).all()
    assert_close(rows[2:].square().sum(1), torch.ones(2))
    (rows * torch.randn_like(rows)).sum().backward()
    assert (leaf.grad[..., :2, :] == 0).all()


@pytest.mark.parametrize("norm", [1e-41, 1e41])
def test_norms_without_an_inverse_in_float32(norm: float) -> None:
    """The larger norm belongs to a hundred thousand numbers of the largest size."""
    maps = torch.full((1, 100_000 if norm > 1 else 4, 2, 2), 1.0)
    maps *= norm / (maps.shape[1] ** 0.5)
    assert_close(patches(maps, 2, eps=0.0, backend="native"), patches(maps.double(), 2, eps=0.0, backend="reference"))


def test_nan_of_one_patch_stays_with_its_pixels() -> None:
    """Pixels of neighbouring patches that this patch does not read receive nothing from its gradient."""
    maps = torch.randn(1, 2, 7, 5, requires_grad=True)
    rows = patches(maps, 3, partition="resize", backend="native")
    slopes = torch.zeros_like(rows)
    slopes[4] = torch.randn(rows.shape[1])
    (touched,) = torch.autograd.grad(rows, maps, slopes, retain_graph=True)
    slopes[4, 0] = torch.nan
    (gradient,) = torch.autograd.grad(rows, maps, slopes)
    assert torch.equal(gradient.isnan(), touched != 0)
    assert (touched != 0).sum() < touched.numel() / 2


def test_nan_and_inf_give_nan() -> None:
    for bad in (torch.nan, torch.inf):
        maps = torch.randn(2, 2, 4, 4)
        maps[1, 0, 3, 0] = bad
        rows = patches(maps, 2, backend="native")
        assert rows[6].isnan().any()
        assert rows[[0, 1, 2, 3, 4, 5, 7]].isfinite().all()


def test_registration() -> None:
    maps, mask = torch.randn(2, 3, 5, 4, dtype=torch.bfloat16), torch.rand(2, 6, 3)
    rows, norms = native.ops.patches(maps, 2, mask, 0.5, True, 1e-8)
    assert build.launches() == 2
    grad = torch.randn(rows.shape[::-1]).T
    settings = (map_shape(maps), 2, mask, 0.5, True)
    assert native.ops.patches_backward(grad, rows, norms, *settings).shape == maps.shape
    assert build.launches() == 3
