"""The Triton operators against float64: run on CPU tensors by tests/interpreter and on a GPU by tests/gpu.

A test takes the device it runs on. Sizes are small and odd: one program of a kernel takes the interpreter milliseconds.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from helpers import assert_as_good_as, assert_close, exactly, loss_and_gradients
from torch import Tensor
from torch.nn.functional import normalize

import kdkernels
from kdkernels.ops.congruence import congruence
from kdkernels.ops.congruence import reference as congruence_reference
from kdkernels.ops.congruence import triton as congruence_triton
from kdkernels.ops.congruence.plan import Coefficients
from kdkernels.ops.kd import reference as kd_reference
from kdkernels.ops.patches import patches
from kdkernels.ops.patches import reference as patches_reference
from kdkernels.ops.patches import triton as patches_triton

ops = torch.ops.kdkernels_triton
FULL_PRECISION = (torch.float32, torch.float64)


def draw(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(device=device, dtype=dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        n, c, h, w = x.shape
        whole = x.new_full((n + 1, c + 2, h + 1, w + 3), float("nan"))
        whole[1:, 1:-1, :-1, 2:-1] = x
        return whole[1:, 1:-1, :-1, 2:-1]
    if layout == "transposed":
        return x.mT.contiguous().mT
    return x


# kd -------------------------------------------------------------------------------------------------------------------


def run_kd(student: Tensor, teacher: Tensor) -> Tensor:
    return kdkernels.kd_loss(student, teacher, temperature=2.5, backend="triton")


def expected_kd(student: Tensor, teacher: Tensor) -> Tensor:
    return kd_reference.kd(student, teacher, 2.5) * 2.5**2


@pytest.mark.parametrize("dtype", FULL_PRECISION)
@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (5, 3), (3, 100), (2, 4097)])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_kd(device: str, dtype: torch.dtype, rows: int, classes: int, layout: str) -> None:
    student, teacher = (
        laid_out(3 * draw(rows, classes, device=device, dtype=dtype), layout).requires_grad_() for _ in range(2)
    )
    loss, gradients = loss_and_gradients(run_kd, student, teacher)
    expected, expected_gradients = loss_and_gradients(expected_kd, *exactly(student, teacher))
    assert loss.dtype == dtype
    assert_close(loss, expected, "loss")
    for gradient, correct in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, correct, "gradient")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kd_in_half_precision(device: str, dtype: torch.dtype) -> None:
    student, teacher = (3 * draw(7, 33, device=device, dtype=dtype) for _ in range(2))
    student.requires_grad_()
    loss, (gradient, _) = loss_and_gradients(run_kd, student, teacher)
    eager, (eager_gradient, _) = loss_and_gradients(lambda s, t: expected_kd(s.float(), t.float()), student, teacher)
    expected, (correct, _) = loss_and_gradients(expected_kd, *exactly(student, teacher))
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    assert_as_good_as(loss, eager, expected, "loss")
    assert_as_good_as(gradient, eager_gradient, correct, "gradient")


def test_kd_of_confident_networks(device: str) -> None:
    """Logits whose exponentials overflow and underflow float32."""
    student, teacher = (300 * draw(4, 50, device=device, dtype=torch.float64) for _ in range(2))
    loss = run_kd(student.float(), teacher.float())
    assert_close(loss, expected_kd(student.float().double(), teacher.float().double()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_kd_of_a_broken_network(device: str, bad: float) -> None:
    for place in range(2):
        logits = [draw(3, 10, device=device) for _ in range(2)]
        logits[place][1, 4] = bad
        assert run_kd(*logits).isnan()


# patches --------------------------------------------------------------------------------------------------------------


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
    """A random mask: nothing of the last image exceeds a threshold, nothing but one pixel of the first."""
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
    """Rows with their components ordered as those of NCHW features."""
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
    boxes = ops.bounding_boxes(masks, 0.5, height, width)
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
    """Offsets beyond 2³¹ elements, in memory that is reserved but hardly touched."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    whole = torch.empty(2**31 + 200, dtype=torch.float16, device=device)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    features = whole.as_strided((2, 3, 4, 4), (2**31, 16, 4, 1))
    features.copy_(draw(2, 3, 4, 4, device=device))
    rows = patches(features, 2, backend="triton")
    assert_close(rows, patches(features.double(), 2, backend="reference"))


# congruence -----------------------------------------------------------------------------------------------------------


def compare(
    device: str,
    images: int,
    positions: int,
    widths: tuple[int, int],
    coefficients: tuple[float, ...],
    form: str,
    dtype: torch.dtype = torch.float32,
    wanted: tuple[bool, bool] = (True, True),
) -> None:
    x, y = (normalize(draw(images * positions, width, device=device, dtype=dtype)) for width in widths)
    x[-1] = 0
    y[0] = 0
    x, y = x.requires_grad_(wanted[0]), laid_out(y, "transposed").requires_grad_(wanted[1])

    def run(x: Tensor, y: Tensor) -> Tensor:
        return congruence(x, y, positions=positions, coefficients=coefficients, form=form, backend="triton")

    def expect(x: Tensor, y: Tensor) -> Tensor:
        return congruence_reference.gram_form(x, y, positions, Coefficients(*coefficients))

    if not any(wanted):
        assert_close(run(x, y), expect(*exactly(x, y)), "loss")
        return
    loss, gradients = loss_and_gradients(run, x, y)
    expected, expected_gradients = loss_and_gradients(expect, *exactly(x, y))
    assert_close(loss, expected, "loss")
    for gradient, correct in zip(gradients, expected_gradients, strict=True):
        assert (gradient is None) == (correct is None)
        if gradient is not None:
            assert_close(gradient, correct, "gradient")


@pytest.mark.parametrize("dtype", FULL_PRECISION)
@pytest.mark.parametrize("form", ["gram", "feature"])
@pytest.mark.parametrize(
    "coefficients",
    [(1.0, 0.0, 0.0, 1.0), (0.7, 0.5, -0.3, 0.2), (0.0, 1.0, 0.0, 0.0), (0.0, 0.5, 2.0, 0.0), (0.5, 0.0, 1.0, 0.0)],
)
def test_congruence(device: str, dtype: torch.dtype, form: str, coefficients: tuple[float, ...]) -> None:
    compare(device, 5, 4, (17, 9), coefficients, form, dtype)


@pytest.mark.parametrize("form", ["gram", "feature", "auto"])
@pytest.mark.parametrize(
    ("images", "positions", "widths"),
    [(1, 4, (3, 2)), (7, 1, (5, 19)), (1, 1, (3, 70)), (35, 2, (66, 1)), (9, 9, (4, 4))],
)
def test_congruence_of_odd_shapes(device: str, form: str, images: int, positions: int, widths: tuple[int, int]) -> None:
    compare(device, images, positions, widths, (0.7, 0.5, -0.3, 0.2), form)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("form", ["gram", "feature"])
def test_congruence_with_the_gradients_wanted(device: str, form: str, wanted: tuple[bool, bool]) -> None:
    compare(device, 9, 9, (11, 6), (0.7, 0.5, -0.3, 0.2), form, wanted=wanted)


def test_congruence_in_strips(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(congruence_triton, "STRIP_ROWS", 16)
    monkeypatch.setattr(congruence_triton, "STRIP_ELEMENTS", (2**8, 2**8))
    compare(device, 9, 5, (11, 6), (0.7, 0.5, -0.3, 0.2), "gram")
    compare(device, 40, 2, (11, 6), (0.0, 0.0, 1.0, 0.0), "gram")


@pytest.mark.parametrize("wanted", [(True, True), (False, False)], ids=str)
def test_congruence_split_along_its_depth(
    device: str, wanted: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(congruence_triton, "SPLIT_DEPTH", 16)
    compare(device, 13, 4, (19, 40), (0.7, 0.0, -0.3, 0.2), "feature", wanted=wanted)


def test_congruence_of_mixed_forms(device: str) -> None:
    """The plan gives each norm its own form here; pure forms stand in for it."""
    compare(device, 12, 4, (4, 200), (1.0, 0.0, 0.0, 1.0), "auto", wanted=(True, False))


def test_no_tensor_of_the_size_of_all_pairs(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher's allocations, with kernels that do nothing."""
    rows, sizes = 4096, []
    new_empty = Tensor.new_empty

    def recording(self: Tensor, *size, **options) -> Tensor:
        result = new_empty(self, *size, **options)
        sizes.append(result.numel())
        return result

    class Idle:
        def __getitem__(self, grid: tuple[int, ...]):
            return lambda *args, **options: None

    monkeypatch.setattr(congruence_triton, "_product_kernel", Idle())
    monkeypatch.setattr(Tensor, "new_empty", recording)
    x = torch.zeros(rows, 8, device=device)
    ops.congruence(x, x, 16, [0.7, 0.5, -0.3, 0.2], [False] * 3, True, True)
    assert rows * 128 <= max(sizes) <= rows**2 // 8


@pytest.mark.parametrize("form", ["gram", "feature"])
def test_congruence_of_broken_rows(device: str, form: str) -> None:
    for place in range(2):
        rows = [draw(20, 7, device=device) for _ in range(2)]
        rows[place][3, 2] = float("nan")
        for coefficients in ((1.0, 0.0, 0.0, 1.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0)):
            loss = congruence(*rows, positions=4, coefficients=coefficients, form=form, backend="triton")
            assert loss.isnan()


# The whole loss -------------------------------------------------------------------------------------------------------


def stages(device: str) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[int]]:
    student = [draw(3, 2, 6, 6, device=device), draw(3, 5, 4, 4, device=device)]
    teacher = [draw(3, 4, 6, 4, device=device), draw(3, 3, 7, 5, device=device)]
    teacher[1] = laid_out(teacher[1], "channels_last")
    masks = [torch.rand(3, *maps.shape[-2:], device=device) for maps in teacher]
    return student, teacher, masks, [2, 3]


def whole_loss(student: list[Tensor], teacher: list[Tensor], masks: list[Tensor], ks: list[int], **options) -> Tensor:
    options = {"weights": (1.0, 0.5, 0.3), "mask": masks, "threshold": 0.6, "partition": "resize", **options}
    return kdkernels.local_correlation_loss(student, teacher, ks, **options)


@pytest.mark.parametrize("form", ["auto", "gram", "feature"])
def test_local_correlation(device: str, form: str) -> None:
    student, teacher, masks, ks = stages(device)

    def run(*maps: Tensor, **options: object) -> Tensor:
        return whole_loss(maps[:2], maps[2:], masks, ks, **options)

    maps = [x.requires_grad_() for x in (*student, *teacher)]
    loss, gradients = loss_and_gradients(lambda *maps: run(*maps, backend="triton", form=form), *maps)
    expected, expected_gradients = loss_and_gradients(
        lambda *maps: run(*maps, backend="reference", form="gram"), *exactly(*maps)
    )
    assert loss.dtype == torch.float32
    assert_close(loss, expected, "loss")
    for gradient, correct in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, correct, "gradient")


def test_local_correlation_of_a_broken_network(device: str) -> None:
    student, teacher, masks, ks = stages(device)
    student[1][2, 1, 3, 0] = float("nan")
    assert whole_loss(student, teacher, masks, ks, threshold=None, backend="triton").isnan()


# Contracts ------------------------------------------------------------------------------------------------------------


def losses(device: str) -> list[tuple[object, Tensor]]:
    """Each operator as a scalar function of one input, and an input."""
    other, logits, rows = draw(3, 2, 4, 4, device=device), draw(4, 6, device=device), draw(8, 3, device=device)
    weight = draw(12, 8, device=device)
    return [
        (lambda x: kdkernels.kd_loss(x, logits, backend="triton"), draw(4, 6, device=device)),
        (lambda x: (patches(x, 2, backend="triton") * weight).sum(), draw(3, 2, 4, 4, device=device)),
        (lambda x: congruence(x, rows, positions=4, form="gram", backend="triton"), draw(8, 3, device=device)),
        (lambda x: congruence(x, rows, positions=4, form="feature", backend="triton"), draw(8, 3, device=device)),
        (lambda x: kdkernels.local_correlation_loss(x, other, 2, backend="triton"), draw(3, 2, 4, 4, device=device)),
    ]


def test_a_second_backward_gives_the_same_gradient(device: str) -> None:
    for function, x in losses(device):
        x.requires_grad_()
        loss = function(x)
        first, second = (torch.autograd.grad(3 * loss, x, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)


def test_reruns_are_bitwise_equal(device: str) -> None:
    for function, x in losses(device):
        x.requires_grad_()
        (a, (grad_a,)), (b, (grad_b,)) = (loss_and_gradients(function, x) for _ in range(2))
        assert torch.equal(a, b)
        assert torch.equal(grad_a, grad_b)


def test_a_second_derivative_raises(device: str) -> None:
    for function, x in losses(device):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(function(x), x, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative"):
            (x.sum() + gradient.square().sum()).backward()


def test_no_gradient_without_grad_mode(device: str) -> None:
    for function, x in losses(device):
        x.requires_grad_()
        with torch.no_grad():
            assert not function(x).requires_grad


def test_compile_without_graph_breaks(device: str) -> None:
    for function, x in losses(device):
        x.requires_grad_()
        loss, (gradient,) = loss_and_gradients(torch.compile(function, fullgraph=True, backend="aot_eager"), x)
        expected, (correct,) = loss_and_gradients(function, x)
        assert torch.equal(loss, expected)
        assert torch.equal(gradient, correct)
        torch.compiler.reset()


def test_registration(device: str) -> None:
    features = [draw(2, 3, 4, 4, device=device), laid_out(draw(2, 3, 5, 5, device=device).bfloat16(), "channels_last")]
    bounds = torch.tensor([[0, 1], [2, 3], [0, 1], [2, 3]], dtype=torch.int32, device=device)
    torch.library.opcheck(ops.bounding_boxes, (torch.rand(2, 5, 3, device=device), 0.5, 7, 7))
    for maps, resize in zip(features, (False, True), strict=True):
        options = (2, torch.rand(2, *maps.shape[-2:], device=device), bounds, resize)
        rows, norms = ops.patches(maps, *options, 1e-8)
        torch.library.opcheck(ops.patches, (maps, *options, 1e-8))
        like = (maps.shape, maps.dtype, resize)
        torch.library.opcheck(ops.patches_backward, (torch.ones_like(rows), rows, norms, *like, *options))
    x, y = draw(8, 3, device=device), laid_out(draw(8, 5, device=device), "transposed")
    for feature in (False, True):
        torch.library.opcheck(ops.congruence, (x, y, 4, [0.7, 0.5, -0.3, 0.2], [feature] * 3, True, False))
    torch.library.opcheck(ops.kd, (x, draw(8, 3, device=device), 4.0, 16.0, True, False))
