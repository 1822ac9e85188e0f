"""``local_correlation`` in CUDA, emulated, against the reference in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import HALF_DTYPES, assert_close, assert_matches, exactly, loss_and_gradients, relative_error
from torch import Tensor

import kdkernels
from kdkernels.ops import local_correlation
from kdkernels.ops.congruence import plan
from kdkernels.ops.local_correlation import Settings

from . import build


def stages(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    student = [torch.randn(3, 2, 6, 6), torch.randn(3, 5, 4, 4)]
    teacher = [torch.randn(3, 4, 6, 4), torch.randn(3, 3, 7, 5).to(memory_format=torch.channels_last)]
    student[0][1:, :, :3, :3] = teacher[0][2, :, :3, :2] = 0  # a zero patch in one network, and a zero patch in both
    return [x.to(dtype) for x in student], [x.to(dtype) for x in teacher]


def check(student: list[Tensor], teacher: list[Tensor], ks: list[int], form: str = "auto", **settings: object) -> None:
    count = len(student)

    def run(*maps: Tensor, backend: str = "native", form: str = form) -> Tensor:
        return kdkernels.local_correlation_loss(
            maps[:count], maps[count:], ks, backend=backend, form=form, partition="resize", **settings
        )

    loss, gradients = loss_and_gradients(run, *student, *teacher)
    exact, exact_gradients = loss_and_gradients(
        lambda *maps: run(*maps, backend="reference", form="gram"), *exactly(*student, *teacher)
    )
    assert_close(loss.float(), exact, "loss")
    for leaf, gradient, correct in zip((*student, *teacher), gradients, exact_gradients, strict=True):
        assert (gradient is None) == (correct is None)
        if gradient is not None:
            assert gradient.dtype == leaf.dtype
            assert_close(gradient, correct, "gradient")


@pytest.mark.parametrize("form", ["auto", "gram", "feature"])
def test_stages_masks_and_weights(order: str, form: str) -> None:
    student, teacher = stages()
    masks = [torch.rand(3, *maps.shape[-2:]) for maps in teacher]
    for maps in (*student, *teacher):
        maps.requires_grad_()
    check(student, teacher, [2, 3], form, weights=(1.0, 0.5, 0.3), mask=masks, threshold=0.6)


@pytest.mark.parametrize("form", ["gram", "feature"])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
def test_the_students_gradient(form: str, reduction: str) -> None:
    student, teacher = stages()
    for maps in student:
        maps.requires_grad_()
    check(student, teacher, [2, 1], form, reduction=reduction)


def test_stages_of_different_dtypes() -> None:
    student, teacher = stages()
    student[1] = student[1].double()
    student = [maps.requires_grad_() for maps in student]
    check(student, teacher, [2, 2])


def test_many_stages() -> None:
    student = [torch.randn(2, 2, 4, 4).requires_grad_() for _ in range(19)]
    check(student, [torch.randn(2, 3, 4, 4) for _ in range(19)], [2] * 19)


@pytest.mark.parametrize(("form", "launches"), [("gram", 4), ("feature", 5), ("auto", 4)])
def test_launches(form: str, launches: int) -> None:
    """The paper's three stages together take as many launches as one stage."""
    student = [torch.randn(2, c, 8, 8).requires_grad_() for c in (40, 2, 1)]
    teacher = [torch.randn(2, c, 8, 8) for c in (40, 2, 1)]
    loss = kdkernels.local_correlation_loss(student, teacher, 4, form=form, backend="native")
    assert build.launches() == launches
    loss.backward()
    assert build.launches() == 1


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 0.5, 0.3), (0.5, 0.5, 0.0)])
def test_launches_are_weighed(weights: tuple[float, float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """There are as many launches as the plan counts, and two for rows and loss. If launches were free, each stage would
    have its own form.
    """
    student = [torch.randn(3, c, 4, 4).requires_grad_() for c in (40, 2, 1)]
    teacher = [torch.randn(3, c, 4, 4) for c in (40, 2, 1)]
    exact = kdkernels.local_correlation_loss(student, teacher, 2, weights=weights, backend="reference")
    counted = []
    for cost in (0, plan.LAUNCH):
        monkeypatch.setattr(plan, "LAUNCH", cost)
        plan._make_plans_once.cache_clear()
        loss = kdkernels.local_correlation_loss(student, teacher, 2, weights=weights, backend="native")
        assert_close(loss, exact)
        counted.append(build.launches())
        stages, _ = local_correlation.check(
            student, teacher, 2, weights, None, "sum", Settings(None, "exact", 1e-8, "auto")
        )
        problems = tuple(stage.problem for stage in stages)
        plans = plan.make_plans("auto", problems, "cuda")
        assert counted[-1] == plan.launches(plans, problems) + 2
    assert counted[1] < counted[0]


def test_upstream_gradient_and_a_second_backward() -> None:
    student, teacher = stages()
    student = [maps.requires_grad_() for maps in student]
    loss = kdkernels.local_correlation_loss(student, teacher, [2, 1], backend="native")
    once = torch.autograd.grad(loss, student, retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, student, retain_graph=True)
    again = torch.autograd.grad(loss, student)
    for a, b, c in zip(once, thrice, again, strict=True):
        assert_close(b, 3 * a)
        assert torch.equal(a, c)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("form", ["gram", "feature"])
@pytest.mark.parametrize(("ks", "masked"), [([2, 1], False), ([3, 3], False), ([2, 1], True)])
def test_half_precision(order: str, dtype: torch.dtype, form: str, ks: list[int], masked: bool) -> None:
    student, teacher = stages(dtype)
    masks = [torch.rand(3, *x.shape[-2:]) for x in teacher] if masked else None
    teacher[0] = teacher[0] * 2.0**-13
    maps = [x.requires_grad_() for x in (*student, *teacher)]

    def run(*maps: Tensor, backend: str = "reference", form: str = "gram") -> Tensor:
        settings = {"form": form, "backend": backend, "weights": (1.0, 0.5, 0.3), "partition": "resize"}
        return kdkernels.local_correlation_loss(maps[:2], maps[2:], ks, mask=masks, **settings)

    assert run(*maps, backend="native").dtype == torch.float32
    assert_matches(lambda *maps: run(*maps, backend="native", form=form), run, *maps)


def test_tf32_where_permitted(request: pytest.FixtureRequest) -> None:
    def run() -> list[Tensor]:
        settings = {"reduction": "sum", "form": "gram", "backend": "native"}
        fused = partial(kdkernels.local_correlation_loss, k=2, **settings)
        loss, gradients = loss_and_gradients(fused, student, teacher)
        return [loss, *gradients]

    student, teacher = (torch.randn(9, c, side, side, requires_grad=True) for c, side in ((5, 6), (7, 4)))
    accurate = run()
    request.getfixturevalue("permit_tf32")
    rounded = run()
    assert not torch.equal(rounded[1], accurate[1])  # losses, which are single numbers, may be equal
    for result, exact in zip(rounded, accurate, strict=True):
        assert relative_error(result, exact) < 2.0**-14


def test_nan_gives_nan() -> None:
    student, teacher = stages()
    teacher[1][2, 1, 3, 0] = torch.nan
    assert kdkernels.local_correlation_loss(student, teacher, [2, 1], backend="native").isnan()
