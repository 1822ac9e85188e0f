"""``gram`` in CUDA, emulated, against the definition in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import DTYPES, HALF_DTYPES, assert_close, assert_gradients, relative_error, three_products
from torch import Tensor

import kdkernels

from . import build


def draw(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def run(features: list[Tensor], upstream: Tensor, backend: str = "native") -> tuple[Tensor, list[Tensor | None]]:
    leaves = [layer.detach().requires_grad_(layer.requires_grad) for layer in features]
    matrices = kdkernels.similarity_matrices(leaves, backend=backend)
    matrices.backward(upstream.to(matrices.dtype))
    return matrices.detach(), [leaf.grad for leaf in leaves]


def check(features: list[Tensor]) -> None:
    batch = len(features[0])
    upstream = torch.randn(batch, len(features), batch).transpose(0, 1)  # not symmetric and not compact
    matrices, gradients = run(features, upstream)
    doubles = [layer.detach().double().requires_grad_(layer.requires_grad) for layer in features]
    exact, exact_gradients = run(doubles, upstream, "reference")
    assert torch.equal(matrices, matrices.mT)
    for matrix, correct in zip(matrices, exact, strict=True):
        assert_close(matrix, correct, "matrix")
    assert_gradients(features, gradients, exact_gradients)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shapes",
    [
        [(1, 1)],
        [(2, 3, 2, 2), (2, 5)],
        [(9, 6, 5, 3), (9, 40), (9, 2, 4, 4)],
        [(65, 24), (65, 5, 3, 3)],
        [(4, 600), (4, 8, 8, 8), (4, 33)],
    ],
    ids=str,
)
def test_sizes(order: str, dtype: torch.dtype, shapes: list[tuple[int, ...]]) -> None:
    """Batches have one tile or more, and depths one part or more. They are read in whole vectors or number
    by number.
    """
    check(draw(*shapes, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x[..., 1:3],
        lambda x: x[:, ::2, 1:, ::2],
        lambda x: x[:1].expand(x.shape),
        lambda x: x[:, :1].expand(x.shape),
        lambda x: x.reshape(5, 2, 2, 2, 2, 2, 3)[:, 1:, :1, :, 1:, :, ::2],
        lambda x: x.reshape(5, 4, 2, 2, 2, 3)[:, ::2, :, ::2, :, ::2],
        lambda x: x.reshape(5, 2, 2, 2, 4, 3)[:, :, :1, :, ::2, ::2],
    ],
    ids=["channels_last", "batch inside", "columns", "steps", "one row", "one channel", "six", "four strides", "five"],
)
def test_strides(dtype: torch.dtype, view: Callable[[Tensor], Tensor]) -> None:
    check([view(x.detach()).requires_grad_() for x in draw((5, 4, 4, 6), (5, 16, 2, 3), dtype=dtype)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_that_are_not_read_in_vectors(dtype: torch.dtype) -> None:
    """A row cannot be read in vectors if its address, its length or its stride is not a multiple of a vector."""
    rows = [(48, 0, 32), (48, 0, 33), (45, 0, 32), (48, 1, 33)]
    check([torch.randn(5, width).to(dtype)[:, begin:end].requires_grad_() for width, begin, end in rows])


def test_more_parts_than_are_added_at_once() -> None:
    check(draw((3, 2100)))


def test_mixed_dtypes() -> None:
    mixed = [x for dtype in DTYPES for x in draw((6, 4, 4, 3), (6, 7), dtype=dtype)]
    check(mixed)
    check([x for x in mixed if x.dtype != torch.float64])


def test_gradients_where_wanted() -> None:
    features = draw((5, 8), (5, 3, 2, 2), (5, 9))
    check([features[0].detach(), features[1], features[2].detach()])


def test_large_half_precision() -> None:
    """Products of such norms overflow float16."""
    for dtype in HALF_DTYPES:
        check([(300 * torch.nn.functional.normalize(torch.rand(6, 400))).to(dtype).requires_grad_()])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_inf(dtype: torch.dtype, value: float) -> None:
    """A sample with NaN or Inf affects only its row and its column."""
    features = [torch.rand(70, 40).to(dtype), torch.rand(70, 3, 3, 3).to(dtype)]
    features[0][66, 17] = value
    matrices = kdkernels.similarity_matrices(features, backend="native")
    broken = ~matrices[0].isfinite()
    assert broken[66].all()
    assert broken[:, 66].all()
    assert broken.sum() == 2 * 70 - 1
    assert matrices[1].isfinite().all()


def test_products_of_float32_are_as_accurate_as_float32() -> None:
    """Without one of the six products of planes, an error is seven times as large or more."""
    layer, slopes = torch.randn(66, 150, requires_grad=True), torch.randn(1, 66, 66)
    matrices, (gradient,) = run([layer], slopes)
    exact = layer.detach().double()
    assert relative_error(matrices[0], exact @ exact.T) < 1e-6
    assert relative_error(gradient, (slopes[0] + slopes[0].T).double() @ exact) < 1e-6


def test_tf32_where_permitted(permit_tf32: None) -> None:
    """Half precision is not rounded."""
    layer, slopes = torch.randn(66, 41, requires_grad=True), torch.randn(1, 66, 66)
    matrices, (gradient,) = run([layer], slopes)
    assert relative_error(matrices[0], three_products(layer, layer.T)) < 1e-6
    assert relative_error(gradient, three_products(slopes[0] + slopes[0].T, layer)) < 1e-6
    half = draw((66, 41), dtype=torch.float16)[0].detach()
    assert_close(kdkernels.similarity_matrices([half], backend="native")[0], half.double() @ half.double().T)


def test_nan_of_any_payload_in_tf32(permit_tf32: None) -> None:
    """The NaN that a GPU makes has all bits set, so an addition to its bits would overflow."""
    layer = torch.randn(3, 9)
    layer[1, 4] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    broken = kdkernels.similarity_matrices([layer], backend="native")[0].isnan()
    assert broken[1].all()
    assert broken.sum() == 5


def test_launches() -> None:
    """All layers together take as many launches as one layer."""
    matrices = kdkernels.similarity_matrices(draw((4, 600), (4, 8, 8, 8), (4, 33)), backend="native")
    assert build.launches() == 2
    matrices.sum().backward()
    assert build.launches() == 2


def test_many_layers() -> None:
    check(draw(*[(3, 4 + width) for width in range(35)]))


def test_reruns_are_bitwise_equal_whatever_the_order() -> None:
    features, upstream = draw((65, 300), (65, 40)), torch.randn(2, 65, 65)
    results = []
    for order in build.ORDERS:
        build.set_order(order)
        results.append(run(features, upstream))
    for matrices, gradients in results[1:]:
        assert torch.equal(matrices, results[0][0])
        assert all(map(torch.equal, gradients, results[0][1]))
