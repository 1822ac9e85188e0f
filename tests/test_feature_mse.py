"""feature_mse against the definition in float64, and its contracts."""

from __future__ import annotations

import multiprocessing
from itertools import chain
from typing import NamedTuple

import pytest
import torch
from helpers import HALF_DTYPES, assert_close, assert_gradients, peak_growth
from torch import Tensor

import kdkernels
from kdkernels import native

needs_native = pytest.mark.skipif(
    native.why_not(torch.device("cpu")) is not None, reason=str(native.why_not(torch.device("cpu")))
)


class Problem(NamedTuple):
    projected: list[list[Tensor]]
    targets: list[list[Tensor]]
    weights: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [*chain(*self.projected, *self.targets), self.weights]

    def like(self, leaves: list[Tensor]) -> Problem:
        rows, columns = self.weights.shape[1:]
        maps = iter(leaves)
        nested = [[[next(maps) for _ in range(columns)] for _ in range(rows)] for _ in range(2)]
        return Problem(*nested, leaves[-1])


def draw(
    batch: int,
    students: list[tuple[int, int]],
    teachers: list[tuple[int, int, int]],
    dtype: torch.dtype = torch.float32,
    change=lambda maps: maps,
) -> Problem:
    """Return student layers with the given heights and widths, and teacher layers with the given channels, heights and
    widths.
    """

    def maps(c: int, size: tuple[int, int]) -> Tensor:
        return change(torch.randn(batch, c, *size).to(dtype)).requires_grad_()

    projected = [[maps(c, size) for c, *_ in teachers] for size in students]
    targets = [[maps(c, (h, w)) for c, h, w in teachers] for _ in students]
    weights = torch.rand(batch, len(students), len(teachers), requires_grad=True)
    return Problem(projected, targets, weights)


def average(length: int, size: int) -> Tensor:
    """Return adaptive average pooling along one axis as a matrix."""
    matrix = torch.zeros(size, length, dtype=torch.float64)
    for i in range(size):
        begin, end = i * length // size, -(-(i + 1) * length // size)
        matrix[i, begin:end] = 1 / (end - begin)
    return matrix


def definition(projected, targets, weights: Tensor, reduction: str) -> Tensor:
    """Return Eq. 7, sample by sample and pair by pair, in float64."""
    batch, students, teachers = weights.shape
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(students):
        for j in range(teachers):
            own, target = projected[i][j], targets[i][j]
            size = [min(a, b) for a, b in zip(own.shape[2:], target.shape[2:], strict=True)]
            own, target = (
                torch.einsum("yh,xw,bchw->bcyx", average(m.shape[2], size[0]), average(m.shape[3], size[1]), m.double())
                for m in (own, target)
            )
            for n in range(batch):
                loss = loss + weights[n, i, j].double() * (own[n] - target[n]).pow(2).mean()
    return loss if reduction == "sum" else loss / (batch * students)


def loss_and_gradients(function, problem: Problem, scale: float = 1.0) -> tuple[Tensor, list[Tensor | None]]:
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in problem.leaves]
    loss = function(*problem.like(leaves))
    (scale * loss).backward()
    return loss.detach(), [leaf.grad for leaf in leaves]


def check(backend: str, problem: Problem, reduction: str = "mean") -> None:
    """Assert that the loss and all gradients equal the definition's, in the right dtypes."""
    loss, grads = loss_and_gradients(
        lambda p, t, w: kdkernels.cross_layer_mse(p, t, w, reduction=reduction, backend=backend), problem, 0.7
    )
    exact_problem = problem.like([x.detach().double().requires_grad_(x.requires_grad) for x in problem.leaves])
    expected, correct = loss_and_gradients(lambda *p: definition(*p, reduction), exact_problem, 0.7)
    maps = problem.leaves[:-1]
    assert loss.dtype == (torch.float64 if any(m.dtype == torch.float64 for m in maps) else torch.float32)
    if problem.weights.dtype == loss.dtype or problem.weights.dtype == torch.float32:
        assert_close(loss.to(torch.promote_types(loss.dtype, torch.float32)), expected, "loss")
    assert_gradients(problem.leaves, grads, correct)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("batch", "students", "teachers"),
    [
        (1, [(1, 1)], [(1, 1, 1)]),
        (3, [(4, 4)], [(5, 4, 4)]),
        (2, [(8, 8), (4, 4), (2, 2)], [(3, 16, 16), (7, 4, 4)]),
        (5, [(5, 3)], [(2, 7, 11), (3, 5, 2), (4, 1, 1)]),
        (2, [(7, 9), (14, 2)], [(17, 3, 4)]),
        (1, [(3, 16)], [(40, 5, 4)]),
        (65, [(3, 3)], [(33, 6, 3)]),
        (2, [(32, 32)], [(70, 8, 4)]),
    ],
    ids=str,
)
def test_matches_the_definition(backend, reduction, batch, students, teachers):
    check(backend, draw(batch, students, teachers), reduction)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 16])
def test_pooling_of_either_map(backend, size):
    """Every even and uneven ratio of 16 pixels, where the target or the projection is the larger."""
    check(backend, draw(2, [(size, 16)], [(3, 16, size), (5, 16, 16)]))


def test_maps_larger_than_a_block(backend):
    """The maps are larger than a block, so some channels are processed at a time."""
    for change in (lambda x: x, lambda x: x.to(memory_format=torch.channels_last)):
        check(backend, draw(1, [(90, 90)], [(9, 91, 45)], change=change))
        check(backend, draw(2, [(64, 64)], [(17, 64, 64)], torch.bfloat16, change))


@pytest.mark.parametrize("students", [(8, 4, 2), (2, 9, 4, 4), (7, 5, 1), (8, 4, 3)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_one_target_for_every_student_layer(backend, students, channels_last):
    """The same tensors occur several times, as in SemCKD. A tensor that requires grad collects the gradients of all
    pairs.
    """
    order = torch.channels_last if channels_last else torch.contiguous_format
    teachers = [torch.randn(3, c, h, h).to(memory_format=order).requires_grad_() for c, h in ((4, 8), (6, 7))]
    sizes = [(4, 8, 8), (6, 7, 7)]
    problem = draw(3, [(h, h) for h in students], sizes, change=lambda x: x.to(memory_format=order))
    targets = [teachers] * len(students)
    fused = kdkernels.cross_layer_mse(problem.projected, targets, problem.weights, backend=backend)
    exact = definition(problem.projected, targets, problem.weights, "mean")
    assert_close(fused, exact)
    for grad, correct in zip(torch.autograd.grad(fused, teachers), torch.autograd.grad(exact, teachers), strict=True):
        assert_close(grad, correct)


@pytest.mark.parametrize("other", [lambda x: x.mT, lambda x: x.view(torch.float16)], ids=["strides", "dtype"])
def test_targets_that_begin_at_one_place(backend, other):
    """Targets with the same address may be different tensors."""
    problem = draw(3, [(6, 6), (6, 6)], [(4, 6, 6)])
    target = problem.targets[0][0].detach().bfloat16()
    check(backend, problem._replace(targets=[[target], [other(target)]]))


@pytest.mark.parametrize("wanted", range(8))
def test_gradients_where_wanted(backend, wanted):
    problem = draw(3, [(4, 4), (2, 2)], [(5, 4, 4)])
    for bit, leaves in enumerate((problem.leaves[:2], problem.leaves[2:4], problem.leaves[4:])):
        for leaf in leaves:
            leaf.requires_grad_(bool(wanted >> bit & 1))
    if wanted:
        check(backend, problem)
    else:
        assert not kdkernels.cross_layer_mse(*problem, backend=backend).requires_grad
    with torch.no_grad():
        assert not kdkernels.cross_layer_mse(*problem, backend=backend).requires_grad


def test_large_half_precision(backend):
    """Squares of features in the hundreds overflow float16."""
    for dtype in HALF_DTYPES:
        problem = draw(2, [(4, 4)], [(5, 8, 8)], dtype, lambda x: 300 * x)
        check(backend, problem)
        plain = kdkernels.cross_layer_mse(*problem, backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(kdkernels.cross_layer_mse(*problem, backend=backend), plain)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", range(3))
def test_nan_and_inf(backend, value, where):
    problem = draw(2, [(4, 4)], [(5, 8, 8)])
    leaves = [x.detach() for x in problem.leaves]
    leaves[where].view(-1)[-1] = value
    assert not kdkernels.cross_layer_mse(*problem.like(leaves), backend=backend).isfinite()


@pytest.mark.parametrize("backend", ["native", "triton"], indirect=True)
def test_a_second_derivative_to_the_weights_raises(backend):
    problem = draw(3, [(4, 4)], [(5, 4, 4)])
    loss = kdkernels.cross_layer_mse(*problem, backend=backend)
    (gradient,) = torch.autograd.grad(loss, problem.weights, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (problem.weights.sum() + gradient.square().sum()).backward()


@needs_native
def test_threads_do_not_change_the_result():
    problem = draw(7, [(16, 16), (4, 4)], [(33, 16, 16), (64, 32, 32)])
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            loss, grads = loss_and_gradients(lambda *p: kdkernels.cross_layer_mse(*p, backend="native"), problem)
            results.append([loss, *grads])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@needs_native
def test_peak_memory():
    """Besides the gradients, a pass takes no tensor of the size of a batch of maps."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        extra, gradients, largest = pool.apply(_extra_memory)
    assert extra < largest / 8, f"{extra / 2**20:.1f} MiB besides gradients of {gradients / 2**20:.1f} MiB"


def _extra_memory() -> tuple[int, int, int]:
    """Return the peak bytes of a pass without its gradients, the size of the gradients, and the size of the largest
    batch of maps.
    """
    torch.ones(1, requires_grad=True).sum().backward()  # loads what the first backward pass of a process needs
    teachers = [torch.ones(64, c, h, h) for c, h in ((64, 64), (128, 32))]
    projected = [[torch.ones(64, t.shape[1], h, h, requires_grad=True) for t in teachers] for h in (64, 16)]
    weights = torch.ones(64, 2, 2, requires_grad=True)
    gradients = sum(p.nbytes for row in projected for p in row)

    def step() -> None:
        kdkernels.cross_layer_mse(projected, [teachers] * 2, weights, backend="native").backward()

    return peak_growth(step) - gradients, gradients, teachers[0].nbytes


MAP = torch.ones(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("projected", "targets", "weights", "settings", "error", "message"),
    [
        (MAP, [[MAP]], torch.ones(2, 1, 1), {}, TypeError, "projected must be a sequence of sequences.*got Tensor"),
        ([[MAP]], [MAP], torch.ones(2, 1, 1), {}, TypeError, r"targets\[0\] must be a sequence of maps, got Tensor"),
        ([[MAP]], [[MAP]], torch.ones(2, 1), {}, ValueError, r"weights must have shape b x s_L x t_L, got \(2, 1\)"),
        ([[MAP]], [[MAP]], torch.ones(2, 1, 2), {}, ValueError, r"projected must hold.*1 student layers of 2.*\[1\]"),
        ([[MAP]], [[MAP], [MAP]], torch.ones(2, 1, 1), {}, ValueError, r"targets must hold.*got lengths \[1, 1\]"),
        (
            [[MAP]],
            [[MAP[:1]]],
            torch.ones(2, 1, 1),
            {},
            ValueError,
            r"targets\[0\]\[0\] must have weights.*batch size 2, got 1",
        ),
        ([[MAP]], [[MAP[:, :2]]], torch.ones(2, 1, 1), {}, ValueError, r"targets\[0\]\[0\] must.*3 channels, got 2"),
        (
            [[MAP[0]]],
            [[MAP]],
            torch.ones(2, 1, 1),
            {},
            ValueError,
            r"projected\[0\]\[0\] must have shape b x c x h x w",
        ),
        ([[MAP.int()]], [[MAP]], torch.ones(2, 1, 1), {}, TypeError, r"projected\[0\]\[0\] must be float32"),
        ([[MAP]], [[MAP.to("meta")]], torch.ones(2, 1, 1), {}, ValueError, r"targets\[0\]\[0\] must be on.*got meta"),
        ([[MAP]], [[MAP]], torch.ones(2, 1, 1), {"reduction": "max"}, ValueError, "reduction must be one of"),
    ],
)
def test_misuse_is_explained(projected, targets, weights, settings, error, message):
    with pytest.raises(error, match=message):
        kdkernels.cross_layer_mse(projected, targets, weights, **settings)
