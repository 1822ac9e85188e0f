"""``icc`` in CUDA, emulated, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, assert_close, assert_matches, exactly, loss_and_gradients, relative_error
from torch import Tensor

import kdkernels
from kdkernels import inter_class_correlation
from kdkernels.ops.icc import reference

from . import build

both_forms = pytest.mark.parametrize("per_sample", [False, True], ids=["map", "per sample"])


def logits(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.5) -> Tensor:
    return (scale * torch.randn(shape)).to(dtype).requires_grad_()


def confident(*shape: int, largest: float = 30) -> Tensor:
    return (largest * (2 * torch.rand(shape) - 1)).requires_grad_()


def run(student: Tensor, teacher: Tensor, per_sample: bool, backend: str = "native") -> Tensor:
    return kdkernels.inter_class_correlation_loss(student, teacher, per_sample=per_sample, backend=backend)


def check(student: Tensor, teacher: Tensor, per_sample: bool) -> None:
    assert_matches(
        lambda s, t: run(s, t, per_sample), lambda s, t: run(s, t, per_sample, "reference"), student, teacher
    )


def check_map(z: Tensor) -> None:
    """Check the map, and the gradient of a weighted sum of its entries in other strides."""
    weight = torch.randn(z.shape[1], z.shape[1], dtype=torch.float64).t()
    assert_close(inter_class_correlation(z, backend="native"), reference.icc_map(z.double()), "map")

    def weighted(m: Tensor) -> Tensor:
        return (m * weight.to(m.dtype)).sum()

    assert_matches(
        lambda z: weighted(inter_class_correlation(z, backend="native")), lambda z: weighted(reference.icc_map(z)), z
    )


SHAPES = [(1, 1), (1, 2), (5, 3), (9, 37), (2, 130)]  # the last map takes several turns


@pytest.mark.parametrize("shape", SHAPES)
@both_forms
def test_matches_the_definition(order: str, shape: tuple[int, int], per_sample: bool) -> None:
    check(logits(*shape), logits(*shape), per_sample)


@both_forms
def test_rows_that_are_nearly_certain(order: str, per_sample: bool) -> None:
    """One entry is nearly 1, and the networks differ only in the other entries, which are about 1e-6."""
    student, teacher = ((torch.tensor([[2.5, -2.5]]) + 0.1 * torch.rand(1, 2)).requires_grad_() for _ in range(2))
    check(student, teacher, per_sample)


@pytest.mark.parametrize("shape", SHAPES)
def test_map_matches_the_definition(order: str, shape: tuple[int, int]) -> None:
    check_map(logits(*shape))


@pytest.mark.parametrize("student", DTYPES)
@pytest.mark.parametrize("teacher", DTYPES)
@both_forms
def test_dtypes_and_strides(student: torch.dtype, teacher: torch.dtype, per_sample: bool) -> None:
    x = logits(21, 6, dtype=student).detach().t().requires_grad_()
    y = logits(12, 30, dtype=teacher).detach()[::2, 3:24].requires_grad_()
    check(x, y, per_sample)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_strides_of_a_map(dtype: torch.dtype) -> None:
    check_map(logits(21, 6, dtype=dtype).detach().t().requires_grad_())


@pytest.mark.parametrize("learning", [(True, False), (False, True)])
@both_forms
def test_gradients_where_wanted(learning: tuple[bool, bool], per_sample: bool) -> None:
    student, teacher = logits(9, 5), logits(9, 5)
    check(student.requires_grad_(learning[0]), teacher.requires_grad_(learning[1]), per_sample)
    with torch.no_grad():
        assert_close(
            run(student, teacher, per_sample), run(student.double(), teacher.double(), per_sample, "reference")
        )


@pytest.mark.parametrize(("dtype", "classes"), [(torch.float32, 1030), (torch.float64, 141)])
def test_rows_longer_than_registers_hold(dtype: torch.dtype, classes: int) -> None:
    student, teacher = logits(1, classes, dtype=dtype), logits(1, classes, dtype=dtype)
    check(student, teacher.detach(), False)


def test_a_map_of_rows_longer_than_registers_hold() -> None:
    check_map(logits(3, 141, dtype=torch.float64))


@pytest.mark.parametrize("largest", [8, 30, 300])
@both_forms
def test_confident_networks(largest: float, per_sample: bool) -> None:
    check(confident(9, 100, largest=largest), confident(9, 100, largest=largest), per_sample)


@pytest.mark.parametrize("scale", [1e2, 1e3, 1e4])
@both_forms
def test_everything_finite_stays_finite(scale: float, per_sample: bool) -> None:
    student, teacher = logits(3, 20, scale=scale), logits(3, 20, scale=scale)
    loss, gradients = loss_and_gradients(lambda s, t: run(s, t, per_sample), student, teacher)
    assert_close(loss, run(student.double(), teacher.double(), per_sample, "reference"))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert inter_class_correlation(student, backend="native").isfinite().all()


@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3, 1e-5])
@both_forms
def test_a_small_divergence_is_precise(noise: float, per_sample: bool) -> None:
    teacher = logits(8, 50)
    student = (teacher + noise * torch.randn(8, 50)).detach().requires_grad_()
    loss, gradients = loss_and_gradients(lambda s, t: run(s, t, per_sample), student, teacher)
    correct, correct_gradients = loss_and_gradients(
        lambda s, t: run(s, t, per_sample, "reference"), *exactly(student, teacher)
    )
    assert relative_error(loss, correct) < 1e-6 / noise
    for gradient, exact in zip(gradients, correct_gradients, strict=True):
        assert relative_error(gradient, exact) < 2e-6 / noise


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_nan_and_inf_give_nan(value: float, where: int) -> None:
    pair = [logits(3, 40).detach() for _ in range(2)]
    pair[where][1, 37] = value
    for per_sample in (False, True):
        loss, gradients = loss_and_gradients(
            lambda s, t, p=per_sample: run(s, t, p), pair[0].requires_grad_(), pair[1].requires_grad_()
        )
        assert loss.isnan()
        assert all(gradient[1].isnan().any() for gradient in gradients)
        assert not per_sample or all(gradient[[0, 2]].isfinite().all() for gradient in gradients)
    z = pair[where].detach().requires_grad_()
    m = inter_class_correlation(z, backend="native")
    assert m.isnan().any()
    assert torch.autograd.grad(m, z, torch.randn(40, 40))[0].isnan().any()


def test_many_samples_of_few_classes() -> None:
    check(logits(300, 10), logits(300, 10), False)


def test_almost_more_shared_memory_than_there_is_without_asking() -> None:
    """With 641 to 768 classes, the dynamic memory of a block is 48 KiB, and the kernel has other arrays too."""
    check(logits(1, 641), logits(1, 641).detach(), False)


@pytest.mark.parametrize("classes", [10, 90])
@both_forms
def test_launches(classes: int, per_sample: bool) -> None:
    student, teacher = logits(16, classes), logits(16, classes).detach()
    build.launches()
    run(student, teacher, per_sample)
    assert build.launches() == 3
