"""``patches`` against the oracle's unit rows. The comparison does not depend on the order of a row's components."""

from __future__ import annotations

import oracle
import pytest
import torch
from helpers import DTYPES, HALF_DTYPES, assert_close, loss_and_gradients, relative_error
from torch import Tensor

from kdkernels.ops.patches import patches


def agree(features: Tensor, k: int, *, mask: Tensor | None = None, backend: str, **settings) -> None:
    """Assert that the cosines of the rows, and the gradient of a random combination of them, equal the oracle's."""
    expected = oracle.Patches(oracle.array(features), k, None if mask is None else oracle.array(mask), **settings)
    unit = torch.from_numpy(expected.unit)
    # Symmetric and without the diagonal, because the diagonal's gradients would cancel.
    mix = torch.randn(len(unit), len(unit), dtype=torch.float64).triu(1)
    mix = mix + mix.T

    def combination(features: Tensor) -> Tensor:
        rows = patches(features, k, mask=mask, backend=backend, **settings)
        assert rows.dtype == torch.promote_types(features.dtype, torch.float32)
        assert rows.shape == unit.shape
        assert_close(rows @ rows.T, unit @ unit.T, "cosines")
        return (rows @ rows.T * mix.to(rows.dtype)).sum()

    _, (gradient,) = loss_and_gradients(combination, features.detach().requires_grad_())
    exact = torch.from_numpy(expected.gradient((2 * mix @ unit).numpy()))
    assert gradient.dtype == features.dtype
    if features.dtype in HALF_DTYPES:
        assert relative_error(gradient, exact) <= torch.finfo(features.dtype).eps
    else:
        assert_close(gradient, exact, "gradient")


def channels_last(*shape: int) -> Tensor:
    return torch.randn(shape).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "k"),
    [
        ((3, 7, 1, 1), 1),
        ((1, 5, 4, 4), 2),
        ((3, 2, 6, 9), 3),
        ((2, 19, 5, 3), 1),
        ((2, 3, 4, 4), 4),
        ((2, 70, 8, 2), 2),
    ],
    ids=str,
)
def test_shapes_and_dtypes(backend, shape, k, dtype):
    agree(torch.randn(shape).to(dtype), k, backend=backend)
    agree(channels_last(*shape).to(dtype), k, backend=backend)


def test_order_of_rows(backend):
    """Row i k² + p is patch p of image i, for any memory format."""
    n, k, h, w = 3, 2, 3, 5
    features = torch.randn(n, 4, k * h, k * w)
    for maps in (features, features.to(memory_format=torch.channels_last)):
        rows = patches(maps, k, backend=backend)
        for i, a, b in torch.cartesian_prod(torch.arange(n), torch.arange(k), torch.arange(k)).tolist():
            patch = features[i, :, a * h : (a + 1) * h, b * w : (b + 1) * w].flatten()
            assert_close(rows[i * k * k + a * k + b].sort().values, (patch / patch.norm()).sort().values)


@pytest.mark.parametrize("where", ["NCHW", "channels_last", "sliced", "transposed", "expanded"])
@pytest.mark.parametrize("settings", [{}, {"partition": "resize"}, {"threshold": 0.6}], ids=str)
def test_strides(backend, where, settings):
    features = {
        "NCHW": lambda: torch.randn(3, 4, 6, 6),
        "channels_last": lambda: channels_last(3, 4, 6, 6),
        "sliced": lambda: torch.randn(6, 6, 9, 12)[1::2, 1:5, 2:8, ::2],
        "transposed": lambda: torch.randn(6, 4, 6, 3).permute(3, 1, 2, 0),
        "expanded": lambda: torch.randn(1, 4, 1, 6).expand(3, 4, 6, 6),
    }[where]()
    mask = torch.rand(3, 6, 6) if settings else None
    agree(features, 2, mask=mask, backend=backend, **settings)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 7), (5, 8), (1, 2), (4, 6)], ids=str)
def test_resize(backend, shape, dtype):
    agree(torch.randn(2, 5, *shape).to(dtype), 3, partition="resize", backend=backend)
    agree(channels_last(2, 5, *shape).to(dtype), 3, partition="resize", backend=backend)


@pytest.mark.parametrize("size", [(6, 6), (3, 3), (12, 4), (5, 7), (1, 1)], ids=str)
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_mask_of_another_size(backend, size, threshold):
    """Mask and box are resampled to the features."""
    mask = torch.rand(4, *size)
    mask[0] = 0.2
    agree(torch.randn(4, 3, 6, 6), 2, mask=mask, threshold=threshold, backend=backend)
    agree(channels_last(4, 3, 6, 6), 2, mask=mask, threshold=threshold, backend=backend)


def test_boxes_by_hand(backend):
    """A box over the right half: its first column of pixels becomes the first columns of the map."""
    features = torch.arange(1.0, 5).expand(1, 1, 4, 4).clone()
    mask = torch.zeros(1, 4, 4)
    mask[..., 2:] = 1
    rows = patches(features, 1, mask=mask, threshold=0.5, backend=backend).view(4, 4)
    expected = torch.tensor([3.0, 3.25, 3.75, 4.0]).expand(4, 4)
    assert_close(rows, expected / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_mask_at_its_threshold_does_not_exceed_it(backend, dtype):
    """The comparison has the precision of the mask: 0.6 is larger in float32 than in float64."""
    features, mask = torch.randn(2, 3, 4, 6), torch.full((2, 4, 6), 0.6, dtype=dtype)
    mask[:, 1:3, 2:] = 0.7
    at, above = (patches(features, 2, mask=mask, threshold=threshold, backend=backend) for threshold in (0.6, 0.65))
    assert torch.equal(at, above)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_resampling_is_that_of_pytorch(backend, layout):
    """Crop and interpolate with torch.nn.functional, image by image."""
    features, mask = torch.randn(3, 2, 6, 6).to(memory_format=layout), torch.rand(3, 6, 6) ** 3
    rows = patches(features, 1, mask=mask, threshold=0.4, backend=backend)
    for image, weight, row in zip(features, mask, rows, strict=True):
        inside = (weight > 0.4).nonzero()
        (top, left), (bottom, right) = inside.min(0).values, inside.max(0).values + 1
        crop = (image * weight)[None, :, top:bottom, left:right]
        whole = torch.nn.functional.interpolate(crop, size=(6, 6), mode="bilinear")
        assert_close(row.sort().values, (whole / whole.norm()).flatten().sort().values)


def test_gradient_at_dead_patches_is_zero(backend):
    features = torch.randn(3, 4, 4, 4)
    features[1, :, 2:, :2] = 0
    features[2, :, :2, :2] *= 1e-12
    agree(features, 2, backend=backend)
    assert patches(features, 2, eps=0, backend=backend)[4 + 2].eq(0).all()
    features.requires_grad_()
    rows = patches(features, 2, backend=backend)
    assert rows[4 + 2].eq(0).all()
    assert rows[8].eq(0).all()
    (rows * torch.randn_like(rows)).sum().backward()
    assert features.grad[1, :, 2:, :2].eq(0).all()
    assert features.grad[2, :, :2, :2].eq(0).all()


def test_rows_have_norm_one(backend):
    for dtype, scale in ((torch.float32, 1e18), (torch.float32, 1e-18), (torch.float16, 1e4), (torch.bfloat16, 1e30)):
        rows = patches((torch.randn(3, 500, 4, 4) * scale).to(dtype), 2, eps=0, backend=backend)
        assert_close(rows.norm(dim=1), torch.ones(12))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_a_number_comes_out(backend, value):
    features = torch.randn(3, 4, 4, 4)
    features[1, 2, 0, 3] = value
    rows = patches(features, 2, backend=backend)
    assert rows[4 + 1].isnan().any()
    assert rows.isnan().any(1).sum() == 1


def test_second_backward_is_right(backend):
    features = torch.randn(3, 4, 6, 6, requires_grad=True)
    rows = patches(features, 2, mask=torch.rand(3, 6, 6), threshold=0.5, backend=backend)
    upstream = torch.randn_like(rows)
    first, second = (torch.autograd.grad(rows, features, upstream, retain_graph=True) for _ in range(2))
    assert torch.equal(first[0], second[0])


@pytest.mark.parametrize("linear", [True, False])
def test_second_derivative_is_right_or_refused(backend, linear):
    """This includes a linear function of the rows, whose gradient is constant."""
    features = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    mix, along = torch.randn(8, 8, dtype=torch.float64), torch.randn(8, 12, dtype=torch.float64)

    def gradient(features: Tensor, create_graph: bool = False) -> Tensor:
        rows = patches(features, 2, backend=backend)
        value = rows * along if linear else rows @ rows.T * mix
        return torch.autograd.grad(value.sum(), features, create_graph=create_graph)[0]

    first = gradient(features, create_graph=True)
    try:
        (features.sum() + first.square().sum()).backward()
    except RuntimeError:
        return
    step, v = 1e-5, first.detach()
    ends = [gradient((features.detach() + sign * step * v).requires_grad_()) for sign in (1, -1)]
    assert relative_error(features.grad, 1 + (ends[0] - ends[1]) / step) < 1e-6


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (
            {"features": torch.randn(2, 3, 7, 6)},
            ValueError,
            ["features", "k=3", "7 x 6", 'partition="resize"', "9 x 6"],
        ),
        ({"features": torch.ones(2, 3, 6, 6, dtype=torch.uint8)}, TypeError, ["features", "float32", "uint8"]),
        ({"k": 0}, ValueError, ["k", "positive integer", "0"]),
        ({"k": 1.5}, ValueError, ["k", "positive integer", "1.5"]),
        ({"mask": torch.rand(3, 6, 6)}, ValueError, ["mask", "batch", "2", "3"]),
        ({"mask": torch.rand(2, 0, 6)}, ValueError, ["mask", "empty", "(2, 0, 6)"]),
        ({"threshold": 0.1}, ValueError, ["threshold", "0.1", "mask"]),
        ({"partition": "same"}, ValueError, ["partition", "resize", "'same'"]),
        ({"eps": -1}, ValueError, ["eps", "-1"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_misuse(changes, error, words):
    arguments = {"features": torch.randn(2, 3, 6, 6), "k": 3, **changes}
    with pytest.raises(error) as raised:
        patches(arguments.pop("features"), arguments.pop("k"), **arguments)
    for word in words:
        assert word in str(raised.value), f"{word!r} is missing in: {raised.value}"
