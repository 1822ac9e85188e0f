"""``icc``"""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, assert_matches
from torch import Tensor

from kdkernels import inter_class_correlation, inter_class_correlation_loss
from kdkernels.ops.icc import reference as icc_reference

from . import FULL_PRECISION, draw, laid_out

both_forms = pytest.mark.parametrize("per_sample", [False, True], ids=["map", "per sample"])


def run_icc(student: Tensor, teacher: Tensor, per_sample: bool) -> Tensor:
    return inter_class_correlation_loss(student, teacher, per_sample=per_sample, backend="triton")


def expected_icc(student: Tensor, teacher: Tensor, per_sample: bool) -> Tensor:
    return icc_reference.icc_loss(student, teacher, per_sample, 1 / student.shape[1])


def check_icc(student: Tensor, teacher: Tensor, per_sample: bool) -> None:
    assert_matches(
        lambda s, t: run_icc(s, t, per_sample), lambda s, t: expected_icc(s, t, per_sample), student, teacher
    )


@both_forms
def test_icc_rows_that_are_nearly_certain(device: str, per_sample: bool) -> None:
    """One entry is nearly 1, and the networks differ only in the other entries, which are about 1e-6."""
    certain = torch.tensor([[2.5, -2.5]], device=device)
    student, teacher = ((certain + 0.1 * draw(1, 2, device=device)).requires_grad_() for _ in range(2))
    check_icc(student, teacher, per_sample)


@pytest.mark.parametrize("dtype", FULL_PRECISION)
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (1, 33), (5, 45)])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@both_forms
def test_icc_loss(device: str, dtype: torch.dtype, shape: tuple[int, int], layout: str, per_sample: bool) -> None:
    student, teacher = (laid_out(1.5 * draw(*shape, device=device, dtype=dtype), layout) for _ in range(2))
    check_icc(student.requires_grad_(), teacher.requires_grad_(), per_sample)
    check_icc(student.detach().requires_grad_(), teacher.detach(), per_sample)


@both_forms
def test_icc_of_confident_networks(device: str, per_sample: bool) -> None:
    """Logits are up to 30, so their products are far outside the range of exp."""
    student, teacher = (60 * torch.rand(4, 40, device=device) - 30 for _ in range(2))
    check_icc(student.requires_grad_(), teacher.requires_grad_(), per_sample)


def test_icc_by_chunks_of_rows(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from kdkernels.ops.icc import triton as kernels

    monkeypatch.setattr(kernels, "HELD", 45 * 17)
    student, teacher = (1.5 * draw(3, 45, device=device) for _ in range(2))
    check_icc(student.requires_grad_(), teacher.requires_grad_(), False)


@pytest.mark.parametrize("dtype", FULL_PRECISION)
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (4, 39)])
@pytest.mark.parametrize("scale", [1.5, 12.0])
def test_icc_map(device: str, dtype: torch.dtype, shape: tuple[int, int], scale: float) -> None:
    logits, weight = scale * draw(*shape, device=device, dtype=dtype), draw(shape[1], shape[1], device=device)
    logits.requires_grad_()
    result = inter_class_correlation(logits, backend="triton")
    expected = icc_reference.icc_map(logits.double())
    assert result.dtype == dtype
    assert_close(result, expected)
    # The gradient of the sum remains if the gradient of a confident network's map vanishes.
    assert_matches(
        lambda z: (inter_class_correlation(z, backend="triton") * weight.to(dtype).t()).sum() + z.sum(),
        lambda z: (icc_reference.icc_map(z) * weight.to(z).t()).sum() + z.sum(),
        logits,
    )
