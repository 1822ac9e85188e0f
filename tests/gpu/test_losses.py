"""Every loss with kernels on a GPU, on each of its backends: pytest -m gpu.

The contracts are the same as on the CPU. What follows them is special to a GPU.
"""

from __future__ import annotations

import functools

import pytest
import torch
from helpers import assert_matches, loss_and_gradients, relative_error
from losses import Loss
from torch import Tensor

import kdkernels
from kdkernels import backends, native

pytest.register_assert_rewrite("test_contracts")

from test_contracts import *  # noqa: E402, F403
from test_contracts import kernel_calls  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU"),
]
del test_any_number_of_threads  # noqa: F821  # of the CPU


@pytest.fixture
def device() -> str:
    return "cuda"


@pytest.fixture(params=["native", "triton", "library"])
def backend(request: pytest.FixtureRequest) -> str:
    reason = backends.why_not(request.param, torch.empty(0, device="cuda"), library=True)
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture(scope="module", params=["native", "triton"])
def calls(request: pytest.FixtureRequest) -> dict[str, list[tuple]]:
    reason = backends.why_not(request.param, torch.empty(0, device="cuda"))
    if reason is not None:
        pytest.skip(reason)
    return kernel_calls(request.param, "cuda")


def draw(loss: Loss, batch: int = 33, width: int = 6) -> list[Tensor]:
    return [x.requires_grad_() for x in loss.draw(batch, width)]


def test_in_a_graph(loss: Loss) -> None:
    inputs = draw(loss)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            loss.function(*inputs).backward()
    torch.cuda.synchronize()
    for x in inputs:
        x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss.function(*inputs)
        captured.backward()
    with torch.no_grad():
        for x in inputs:
            x.normal_()
    graph.replay()
    expected, gradients = loss_and_gradients(loss.function, *inputs)
    assert torch.equal(captured, expected)
    assert all(torch.equal(x.grad, gradient) for x, gradient in zip(inputs, gradients, strict=True))


def test_without_waiting_for_the_device(loss: Loss) -> None:
    inputs = draw(loss)
    loss.function(*inputs).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss.function(*inputs).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_on_a_side_stream(loss: Loss) -> None:
    """The inputs appear on the side stream after a while. A kernel on another stream would read the old values."""
    final = draw(loss)
    expected = loss.function(*final)
    inputs = [torch.full_like(x, torch.nan) for x in final]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        for x, value in zip(inputs, final, strict=True):
            x.copy_(value.detach())
        result = loss.function(*inputs)
    side.synchronize()
    assert torch.equal(result, expected)


@pytest.mark.parametrize("name", ["local_correlation, Gram form", "correlation_congruence", "gram"])
def test_tf32_where_permitted(loss: Loss) -> None:
    inputs = draw(loss, 70, 16)
    accurate, gradients = loss_and_gradients(loss.function, *inputs)
    try:
        torch.set_float32_matmul_precision("high")
        rounded, others = loss_and_gradients(loss.function, *inputs)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not torch.equal(rounded, accurate)
    for result, expected in zip((rounded, *others), (accurate, *gradients), strict=True):
        assert relative_error(result, expected) <= 2e-3


def test_offsets_beyond_32_bits(loss: Loss) -> None:
    apart = 2**31 + 64
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("the GPU has less than 12 GiB of free memory")
    fill, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        False,
    )
    near, teacher = loss.draw(2)
    if len(near) != 2:
        pytest.skip("the loss takes several rows for each image")
    memory = torch.empty(apart + near[0].numel(), device="cuda")
    torch.utils.deterministic.fill_uninitialized_memory = fill
    far = memory.as_strided(near.shape, (apart, *near.stride()[1:]))
    far.copy_(near)
    assert torch.equal(loss.function(far, teacher), loss.function(near, teacher))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_on_another_device(loss: Loss) -> None:
    inputs = loss.draw()
    there = loss.function(*(x.to("cuda:1") for x in inputs))
    assert torch.equal(there.cpu(), loss.function(*inputs).cpu())


@pytest.mark.parametrize("form", ["gram", "feature"])
def test_memory(form: str) -> None:
    """Rows, gradients and strips take at most 64 MiB. All pairs in float32 would take 1 GiB."""
    if native.why_not(torch.device("cuda", 0)):
        pytest.skip(str(native.why_not(torch.device("cuda", 0))))
    student, teacher = (torch.randn(1024, 64, 8, 8, device="cuda") for _ in range(2))
    student.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = kdkernels.local_correlation_loss(student, teacher, 4, form=form, backend="native")
    torch.autograd.grad(loss, student)
    assert torch.cuda.max_memory_allocated() - before <= 5 * student.nbytes + 72 * 2**20


def test_memory_of_correlations() -> None:
    """The memory is compact logits, four numbers per row of every P, and twice 4 Mi derivatives. b·K² floats would take
    4 GiB.
    """
    if native.why_not(torch.device("cuda", 0)):
        pytest.skip(str(native.why_not(torch.device("cuda", 0))))
    student, teacher = (torch.randn(256, 2000, device="cuda") for _ in range(2))
    student.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = kdkernels.inter_class_correlation_loss(student, teacher, backend="native")
    torch.autograd.grad(loss, student)
    assert torch.cuda.max_memory_allocated() - before <= 13 * student.nbytes + 34 * 2**20


@pytest.mark.parametrize("largest", [8, 30])
@pytest.mark.parametrize("classes", [100, 700, 1000, 2500])
def test_correlations_of_confident_networks(backend: str, largest: float, classes: int) -> None:
    """float32 cannot hold some entries of the maps. Rows are held together or in several turns."""
    logits = [(largest * (2 * torch.rand(9, classes, device="cuda") - 1)).requires_grad_() for _ in range(2)]
    fused, exact = (
        functools.partial(kdkernels.inter_class_correlation_loss, backend=name) for name in (backend, "reference")
    )
    assert_matches(fused, exact, *logits)
