"""gram against the definition in float64, and its contracts."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from helpers import HALF_DTYPES, assert_close, assert_gradients, peak_growth, relative_error
from torch import Tensor

import kdkernels
from kdkernels import native
from kdkernels.ops.gram import in_memory_order

needs_native = pytest.mark.skipif(
    native.why_not(torch.device("cpu")) is not None, reason=str(native.why_not(torch.device("cpu")))
)

SHAPES = [
    [(1, 1)],
    [(1, 3, 2, 2), (1, 5)],
    [(2, 7), (2, 1, 1, 1), (2, 3, 5, 2)],
    [(7, 3, 5, 5), (7, 16, 4, 4), (7, 33)],
    [(33, 5, 3, 3), (33, 130), (33, 2, 3, 2, 5)],
    [(64, 16, 8, 8), (64, 8, 16, 16), (64, 517)],
    [(100, 9, 7, 7), (100, 64)],
    [(5, 70000)],
]


def definition(features: list[Tensor]) -> Tensor:
    """Return the matrices by einsum in float64."""
    return torch.stack([torch.einsum("ik,jk->ij", f.flatten(1), f.flatten(1)) for f in features])


def value_and_gradients(function, features: list[Tensor], upstream: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    leaves = [f.detach().requires_grad_(f.requires_grad) for f in features]
    matrices = function(leaves)
    if matrices.requires_grad:
        matrices.backward(upstream.to(matrices.dtype))
    return matrices.detach(), [leaf.grad for leaf in leaves]


def check(backend: str, features: list[Tensor]) -> None:
    """Assert that matrices and gradients equal the definition's, in the right dtypes."""
    batch = features[0].shape[0]
    upstream = torch.randn(len(features), batch, batch, dtype=torch.float64)  # not symmetric
    matrices, grads = value_and_gradients(
        lambda layers: kdkernels.similarity_matrices(layers, backend=backend), features, upstream
    )
    doubles = [f.detach().double().requires_grad_(f.requires_grad) for f in features]
    expected, correct = value_and_gradients(definition, doubles, upstream)
    assert matrices.dtype == (torch.float64 if any(f.dtype == torch.float64 for f in features) else torch.float32)
    if backend != "reference":  # PyTorch's products are symmetric only on some processors
        assert torch.equal(matrices, matrices.mT)
    for matrix, exact in zip(matrices, expected, strict=True):
        assert_close(matrix, exact, "matrix")
    assert_gradients(features, grads, correct)


def draw(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_matches_the_definition(backend, shapes):
    check(backend, draw(shapes))


def test_gradients_keep_the_memory_format(backend):
    if backend == "reference":
        pytest.skip("PyTorch chooses")
    features = [f.detach().to(memory_format=torch.channels_last).requires_grad_() for f in draw([(4, 6, 5, 3)])]
    kdkernels.similarity_matrices(features, backend=backend).sum().backward()
    assert features[0].grad.stride() == features[0].stride()


def test_layers_are_read_as_they_lie():
    """The order of the terms of a product only changes the speed of reading."""
    layer = torch.randn(3, 4, 5, 6)
    assert in_memory_order(layer).stride() == layer.stride()
    for view in (layer.to(memory_format=torch.channels_last), layer.transpose(1, 2), layer.permute(0, 3, 1, 2)):
        strides = in_memory_order(view).stride()
        assert strides[1:] == tuple(sorted(view.stride()[1:], reverse=True))


def test_half_precision_of_large_norm(backend):
    """Rows have norm 300, so their products overflow float16. Some have equal features."""
    for dtype in HALF_DTYPES:
        features = [(300 * torch.nn.functional.normalize(torch.rand(6, 400))).to(dtype).requires_grad_()]
        check(backend, features)
        plain = kdkernels.similarity_matrices(features, backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(kdkernels.similarity_matrices(features, backend=backend), plain)


def test_zero_rows(backend):
    features = draw([(5, 12)])[0].detach()
    features[2] = 0
    check(backend, [features.requires_grad_()])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_inf(backend, value):
    """A sample with NaN or Inf affects only its row and its column."""
    features = [torch.rand(5, 40), torch.rand(5, 3, 3, 3)]
    features[0][1, 17] = value
    matrices = kdkernels.similarity_matrices(features, backend=backend)
    broken = ~matrices[0].isfinite()
    assert broken[1].all()
    assert broken[:, 1].all()
    assert broken.sum() == 9
    assert matrices[1].isfinite().all()


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_shared_out_over_threads(threads):
    """A layer is computed by several threads, and several layers by one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check("native", draw([(40, 4000), (40, 3), (40, 700), (40, 2, 30, 31)]))
        check("native", draw([(40, 40), (40, 5000)], torch.bfloat16))
        check("native", draw([(40, 4096)] * 2))  # the second thread begins at the begin of a layer
    finally:
        torch.set_num_threads(before)


@needs_native
def test_peak_memory():
    """Besides matrices and gradients, a forward and backward pass takes no second copy of the features."""
    context = multiprocessing.get_context("spawn")
    for dtype in (torch.float32, torch.bfloat16):
        with context.Pool(1) as pool:
            extra, size = pool.apply(_extra_memory, (dtype,))
        assert extra < size / 8, f"{extra / 2**20:.1f} MiB besides gradients of {size / 2**20:.1f} MiB in {dtype}"


def _extra_memory(dtype: torch.dtype) -> tuple[int, int]:
    """Return the peak bytes of a pass without its gradients, and the size of the gradients."""
    features = [
        torch.ones(64, 64, 64, 64, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_(),
        torch.ones(64, 65536, dtype=dtype).requires_grad_(),
    ]
    size = sum(f.nbytes for f in features)

    def step() -> None:
        kdkernels.similarity_matrices(features, backend="native").sum().backward()

    torch.ones(1, requires_grad=True).sum().backward()  # loads what the first backward pass of a process needs
    return peak_growth(step) - size, size


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        (torch.ones(2, 3), TypeError, "features must be a sequence of tensors.*got Tensor"),
        ([], ValueError, "features must hold at least one layer"),
        ([torch.ones(2, 3), 1], TypeError, r"features\[1\] must be a tensor, got int"),
        ([torch.ones(3)], ValueError, r"features\[0\] must have shape b x ..., got \(3,\)"),
        ([torch.ones(2, 3), torch.ones(4, 3)], ValueError, r"features\[1\] must have.*batch size 2, got 4"),
        ([torch.ones(2, 3).int()], TypeError, r"features\[0\] must be float32.*got torch.int32"),
        ([torch.ones(2, 0)], ValueError, r"features\[0\] must not be empty"),
        ([torch.ones(2, 3), torch.ones(2, 3, device="meta")], ValueError, r"features\[1\] must be on.*got meta"),
    ],
)
def test_misuse_is_explained(features, error, message):
    with pytest.raises(error, match=message):
        kdkernels.similarity_matrices(features)


def test_relative_error_of_a_long_sum(backend):
    """Features after a ReLU have one sign. The rounding error of a naive float32 sum would grow with its length."""
    features = [torch.rand(3, 200_000)]
    matrices = kdkernels.similarity_matrices(features, backend=backend)
    assert relative_error(matrices, definition([f.double() for f in features])) < 2e-6


def test_explain_names_the_backend():
    features = [torch.randn(3, 4)]
    with kdkernels.use_backend("reference"):
        assert str(kdkernels.explain("similarity_matrices", features)).startswith("similarity_matrices: reference")
        maps = [[torch.randn(3, 2, 4, 4)]]
        told = str(kdkernels.explain("cross_layer_mse", maps, maps, torch.ones(3, 1, 1)))
    assert told.startswith("cross_layer_mse: reference")
    with pytest.raises(TypeError, match="features must be a sequence"):
        kdkernels.explain("similarity_matrices", features[0])
