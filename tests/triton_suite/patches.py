"""``patches``"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from helpers import assert_as_good_as, assert_close
from torch import Tensor

from kdkernels.ops.patches import patches
from kdkernels.ops.patches import reference as patches_reference
from kdkernels.ops.patches import triton as patches_triton

from . import FULL_PRECISION, draw, laid_out


class Case(NamedTuple):
    n: int
    c: int
    h: int
    w: int
    k: int
    mask: str = "none"  # "none", "same" size as the map, or "other" size
    threshold: float | None = None
    partition: str = "exact"


CASES = (
    Case(1, 1, 3, 5, 1),
    Case(3, 5, 6, 4, 2),
    Case(2, 3, 6, 9, 3, "same"),
    Case(2, 3, 8, 4, 2, "other"),
    Case(3, 3, 6, 4, 2, "same", 0.6),
    Case(2, 2, 4, 6, 2, "other", 0.6),
    Case(2, 3, 7, 5, 3, partition="resize"),
    Case(2, 2, 5, 7, 2, "same", 0.5, "resize"),
    Case(3, 2, 4, 4, 3, "other", 0.7, "resize"),
)


def draw_mask(case: Case, device: str, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """Return a random mask. No pixel of the last image exceeds the threshold, and only one pixel of the first image
    does.
    """
    if case.mask == "none":
        return None
    size = (case.h, case.w) if case.mask == "same" else (case.h // 2 + 1, case.w + 3)
    mask = torch.rand(case.n, *size, device=device, dtype=dtype)
    mask[-1] /= 4
    if case.n > 2:
        mask[0] /= 4
        mask[0, -1, 0] = 1
    return mask


def settings(case: Case, mask: Tensor | None) -> dict[str, object]:
    return {"mask": mask, "threshold": case.threshold, "partition": case.partition}


def in_channel_order(rows: Tensor, channels: int, layout: str) -> Tensor:
    """Return rows with their components in the order of NCHW features."""
    if layout != "channels_last" or channels == 1:
        return rows
    return rows.unflatten(1, (-1, channels)).transpose(1, 2).flatten(1)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", FULL_PRECISION)
def test_patches(device: str, dtype: torch.dtype, case: Case, layout: str) -> None:
    features = draw(*case[:4], device=device, dtype=dtype)
    features[0, :, : case.h // 2 + 1] = 0
    features = laid_out(features, layout)
    mask = draw_mask(case, device, dtype)
    leaf = features.requires_grad_()
    exact = leaf.detach().double().requires_grad_()

    rows = patches(leaf, case.k, backend="triton", **settings(case, mask))
    expected = patches(exact, case.k, backend="reference", **settings(case, mask))
    assert rows.dtype == dtype
    assert_close(in_channel_order(rows, case.c, layout), expected, "rows")

    upstream = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad(in_channel_order(rows, case.c, layout), leaf, upstream.to(dtype))
    (correct,) = torch.autograd.grad(expected, exact, upstream.to(dtype).double())
    assert_close(gradient, correct, "gradient")
    if layout == "channels_last" and case.c > 1:
        assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("height", "width"), [(5, 7), (9, 4), (40, 33)])
def test_bounding_boxes(device: str, height: int, width: int) -> None:
    masks = torch.rand(6, 40, 33, device=device).mT.contiguous().mT
    masks[torch.rand_like(masks) > 0.003] = 0
    masks[0] = 0
    masks[1, 3, 4] = float("nan")
    masks[2] = 0.5
    boxes = patches_triton._bounding_boxes(masks, 0.5, height, width)
    expected = torch.stack(patches_reference.bounding_boxes(masks, 0.5, height, width))
    assert torch.equal(boxes.long(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_patches_in_half_precision(device: str, dtype: torch.dtype) -> None:
    case = CASES[-2]
    features = draw(*case[:4], device=device, dtype=dtype)
    options = settings(case, draw_mask(case, device))
    upstream = draw(case.n * case.k**2, case.c * 3 * 4, device=device)
    results = []
    for leaf, backend in ((features, "triton"), (features.float(), "reference"), (features.double(), "reference")):
        leaf = leaf.detach().requires_grad_()
        rows = patches(leaf, case.k, backend=backend, **options)
        results.append((rows, torch.autograd.grad(rows, leaf, upstream.to(rows.dtype))[0]))
    (rows, gradient), (eager, eager_gradient), (expected, correct) = results
    assert gradient.dtype == dtype
    assert_as_good_as(rows, eager, expected, "rows")
    assert_as_good_as(gradient, eager_gradient.to(dtype), correct, "gradient")


def test_pixels_on_pixels_take_nothing_of_their_neighbours(device: str) -> None:
    """A crop of 7 pixels is resampled to 13. The middle pixel equals the middle of the crop, for any neighbours."""
    features, mask = draw(1, 1, 13, 13, device=device) * 1e6, torch.zeros(1, 13, 13, device=device)
    mask[:, 2:9, 5:12] = 1
    features[:, :, 5, 8] = 0
    rows = patches(features, 13, mask=mask, threshold=0.5, backend="triton")
    assert_close(rows, patches(features.double(), 13, mask=mask, threshold=0.5, backend="reference"), "rows")


def test_rows_longer_than_a_block(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches_triton, "ROW_BLOCK", 32)
    monkeypatch.setattr(patches_triton, "RESAMPLED_BLOCK", 32)
    for case in (Case(2, 5, 6, 8, 2), Case(2, 5, 5, 7, 2, "same", 0.5, "resize")):
        test_patches(device, torch.float32, case, "contiguous")


@pytest.mark.parametrize("size", [3e38, 1e30, 1e-5, 1e-30])
def test_patches_of_any_size(device: str, size: float) -> None:
    features = size * torch.rand(2, 4, 4, 4, device=device)
    rows = patches(features, 2, eps=0.0, backend="triton")
    assert_close(rows, patches(features.double(), 2, eps=0.0, backend="reference"))


def test_patches_far_apart_in_memory(device: str) -> None:
    """Offsets exceed 2³¹ elements, in memory that is reserved but hardly touched."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    whole = torch.empty(2**31 + 200, dtype=torch.float16, device=device)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    features = whole.as_strided((2, 3, 4, 4), (2**31, 16, 4, 1))
    features.copy_(draw(2, 3, 4, 4, device=device))
    rows = patches(features, 2, backend="triton")
    assert_close(rows, patches(features.double(), 2, backend="reference"))
