"""Every fused loss on a GPU, on each of its backends: pytest -m gpu."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from helpers import DTYPES, assert_matches, loss_and_gradients, relative_error
from torch import Tensor

import kdkernels
from kdkernels import backends, native

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU"),
]

Loss = Callable[..., Tensor]


@pytest.fixture(params=["native", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    reason = backends.why_not(request.param, torch.empty(0, device="cuda"))
    if reason is not None:
        pytest.skip(reason)
    if request.param == "native" and request.node.callspec.params.get("loss") in SP.values():
        pytest.skip("SP has no kernels in CUDA")
    return request.param


def as_logits(*tensors: Tensor) -> list[Tensor]:
    classes = min(x[0].numel() for x in tensors)
    return [x.flatten(1)[:, :classes] for x in tensors]


def kd(student: Tensor, teacher: Tensor, **options: str) -> Tensor:
    return kdkernels.kd_loss(*as_logits(student, teacher), **options)


def lkd(student: Tensor, teacher: Tensor, **options: object) -> Tensor:
    return kdkernels.local_correlation_loss(student, teacher, 2, weights=(1.0, 0.5, 0.3), **options)


def masked_lkd(student: Tensor, teacher: Tensor, **options: object) -> Tensor:
    rows = torch.linspace(0, 1, teacher.shape[-2] * teacher.shape[-1], device=teacher.device)
    mask = rows.view(teacher.shape[-2:]).expand(len(teacher), -1, -1)
    settings = {"mask": mask, "threshold": 0.4, "partition": "resize", **options}
    return kdkernels.local_correlation_loss(student, teacher, 3, **settings)


def cckd(student: Tensor, teacher: Tensor, **options: object) -> Tensor:
    return kdkernels.correlation_congruence_loss(student.flatten(1), teacher.flatten(1), **options)


def sp(student: Tensor, teacher: Tensor, **options: object) -> Tensor:
    return kdkernels.similarity_preserving_loss(student, teacher, **options)


def icct(student: Tensor, teacher: Tensor, **options: object) -> Tensor:
    return kdkernels.inter_class_correlation_loss(*as_logits(student, teacher), **options)


def icct_maps(student: Tensor, teacher: Tensor, **options: str) -> Tensor:
    one, other = (kdkernels.inter_class_correlation(x, **options) for x in as_logits(student, teacher))
    return (one * other).sum()


def similarities(student: Tensor, teacher: Tensor, **options: object) -> Tensor:
    return kdkernels.similarity_matrices([student, teacher, student], **options).square().mean()


def cross_layer_mse(student: Tensor, teacher: Tensor, **options: object) -> Tensor:
    if options["backend"] == "reference":
        student, teacher = student.cpu(), teacher.cpu()  # on a GPU, averaging has no deterministic gradient
    channels = min(student.shape[1], teacher.shape[1])
    student, teacher = student[:, :channels], teacher[:, :channels]
    weights = torch.linspace(0, 1, 2 * len(student), device=student.device).view(-1, 1, 2)
    return kdkernels.cross_layer_mse([[student, student]], [[teacher, student.flip(1)]], weights, **options)


def in_form(loss: Loss, form: str) -> Loss:
    def run(*inputs: Tensor, **options: object) -> Tensor:
        return loss(*inputs, form=form, **options)

    return run


SP: dict[str, Loss] = {"sp, Gram form": in_form(sp, "gram"), "sp, feature form": in_form(sp, "feature")}
LOSSES: dict[str, Loss] = {
    "kd": kd,
    "lkd": lkd,
    "lkd, Gram form": in_form(lkd, "gram"),
    "lkd, feature form": in_form(lkd, "feature"),
    "lkd, masked": masked_lkd,
    "cckd": cckd,
    "cckd, rbf": functools.partial(cckd, kernel="rbf"),
    "cckd, bilinear": functools.partial(cckd, kernel="bilinear"),
    "cckd, mmd": functools.partial(cckd, kernel="mmd"),
    **SP,
    "icct": icct,
    "icct, per sample": functools.partial(icct, per_sample=True),
    "icct, maps": icct_maps,
    "similarities": similarities,
    "cross_layer_mse": cross_layer_mse,
}
SHAPES = [((1, 3, 2, 2), (1, 4, 4, 4)), ((33, 6, 8, 8), (33, 17, 4, 4)), ((70, 16, 4, 4), (70, 40, 8, 8))]

every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=list(LOSSES))


def maps(shapes: tuple = SHAPES[1], dtype: torch.dtype = torch.float32, channels_last: bool = False) -> list[Tensor]:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return [
        torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=memory_format).requires_grad_()
        for shape in shapes
    ]


def check(loss: Loss, backend: str, inputs: list[Tensor]) -> None:
    assert_matches(lambda *x: loss(*x, backend=backend), lambda *x: loss(*x, backend="reference"), *inputs)


@every_loss
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
def test_against_float64(loss: Loss, backend: str, shapes: tuple, dtype: torch.dtype, channels_last: bool) -> None:
    inputs = maps(shapes, dtype, channels_last)
    if loss is SP["sp, feature form"] and len(inputs[0]) == 1:
        pytest.skip("one sample resembles itself alone: the gradient is 0, from numbers that cancel")
    check(loss, backend, inputs)


@every_loss
def test_autocast_changes_nothing(loss: Loss, backend: str) -> None:
    inputs = maps(dtype=torch.bfloat16)
    plain = loss_and_gradients(lambda *x: loss(*x, backend=backend), *inputs)
    with torch.autocast("cuda", torch.bfloat16):
        mixed = loss_and_gradients(lambda *x: loss(*x, backend=backend), *inputs)
    assert mixed[0].dtype == torch.float32
    assert torch.equal(plain[0], mixed[0])
    assert all(map(torch.equal, plain[1], mixed[1]))


@every_loss
def test_reruns_are_bitwise_equal(loss: Loss, backend: str) -> None:
    inputs = maps(SHAPES[2])
    first, second = (loss_and_gradients(lambda *x: loss(*x, backend=backend), *inputs) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(map(torch.equal, first[1], second[1]))


@every_loss
def test_in_a_graph(loss: Loss, backend: str) -> None:
    inputs = maps()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            loss(*inputs, backend=backend).backward()
    torch.cuda.synchronize()
    for x in inputs:
        x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss(*inputs, backend=backend)
        captured.backward()
    with torch.no_grad():
        for x in inputs:
            x.normal_()
    graph.replay()
    expected, gradients = loss_and_gradients(lambda *x: loss(*x, backend=backend), *inputs)
    assert torch.equal(captured, expected)
    assert all(torch.equal(x.grad, gradient) for x, gradient in zip(inputs, gradients, strict=True))


@every_loss
def test_without_waiting_for_the_device(loss: Loss, backend: str) -> None:
    inputs = maps()
    loss(*inputs, backend=backend).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(*inputs, backend=backend).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_loss
def test_on_a_side_stream(loss: Loss, backend: str) -> None:
    """Inputs that appear on that stream after a while: whoever runs on another one reads what was there before."""
    final = maps()
    expected = loss(*final, backend=backend)
    inputs = [torch.full_like(x, torch.nan) for x in final]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        for x, value in zip(inputs, final, strict=True):
            x.copy_(value.detach())
        result = loss(*inputs, backend=backend)
    side.synchronize()
    assert torch.equal(result, expected)


@pytest.mark.parametrize("name", ["lkd, Gram form", "cckd", "similarities"])
def test_tf32_where_permitted(name: str, backend: str) -> None:
    def run() -> tuple[Tensor, list[Tensor | None]]:
        return loss_and_gradients(lambda *x: loss(*x, backend=backend), *inputs)

    loss, inputs = LOSSES[name], maps(SHAPES[2])
    accurate, gradients = run()
    try:
        torch.set_float32_matmul_precision("high")
        rounded, others = run()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not torch.equal(rounded, accurate)
    for result, expected in zip((rounded, *others), (accurate, *gradients), strict=True):
        assert relative_error(result, expected) <= 2e-3


@pytest.mark.parametrize("loss", [kd, lkd], ids=["kd", "lkd"])
def test_compiled_into_one_graph(loss: Loss, backend: str) -> None:
    inputs = maps()
    compiled = torch.compile(lambda *x: 2 * loss(*x, backend=backend), fullgraph=True)
    assert_matches(compiled, lambda *x: 2 * loss(*x, backend="reference"), *inputs)
    torch.compiler.reset()


@every_loss
def test_nan_gives_nan(loss: Loss, backend: str) -> None:
    student, teacher = (x.detach() for x in maps())
    student[5, 3, 7, 7] = torch.nan
    assert loss(student, teacher, backend=backend).isnan()


@every_loss
def test_offsets_beyond_32_bits(loss: Loss, backend: str) -> None:
    apart = 2**31 + 64
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("the GPU has less than 12 GiB of free memory")
    fill, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        False,
    )
    memory = torch.empty(apart + 4 * 4 * 4, device="cuda")
    torch.utils.deterministic.fill_uninitialized_memory = fill
    far = memory.as_strided((2, 4, 4, 4), (apart, 16, 4, 1))
    near, teacher = (torch.randn(2, 4, 4, 4, device="cuda") for _ in range(2))
    far.copy_(near)
    assert torch.equal(loss(far, teacher, backend=backend), loss(near, teacher, backend=backend))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
@every_loss
def test_on_another_device(loss: Loss, backend: str) -> None:
    inputs = [x.detach() for x in maps()]
    there = loss(*(x.to("cuda:1") for x in inputs), backend=backend)
    assert torch.equal(there.cpu(), loss(*inputs, backend=backend).cpu())


@pytest.mark.parametrize("form", ["gram", "feature"])
def test_memory(form: str) -> None:
    """Rows, gradients and strips of at most 64 MiB; all pairs in float32 would be 1 GiB."""
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
    """Compact logits, four numbers for every row of every P, twice 4 Mi derivatives; b·K² floats would be 4 GiB."""
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
    """Entries of the maps that float32 cannot hold, in rows that are held at once and that are not."""
    check(
        icct, backend, [(largest * (2 * torch.rand(9, classes, device="cuda") - 1)).requires_grad_() for _ in range(2)]
    )
