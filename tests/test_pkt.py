"""PKT and FitNet's hint, which have no operator of their own, against their definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, assert_matches, exactly, loss_and_gradients
from torch import Tensor

import kdkernels


def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean of p log(p / q), row by row and sample by sample."""

    def affinities(rows: Tensor) -> list[list[Tensor]]:
        return [[(1 + F.cosine_similarity(a, b, dim=0, eps=0)) / 2 for b in rows] for a in rows]

    p, q = affinities(teacher), affinities(student)
    terms = []
    for row_p, row_q in zip(p, q, strict=True):
        for a, b in zip(row_p, row_q, strict=True):
            a, b = a / sum(row_p), b / sum(row_q)
            terms.append(a * (a / b).log())
    return torch.stack(terms).mean()


@pytest.mark.parametrize(("batch", "width", "other"), [(1, 3, 2), (2, 4, 4), (7, 5, 9), (12, 33, 2)])
def test_pkt_matches_the_definition(batch, width, other):
    student, teacher = (torch.rand(batch, d, requires_grad=True) for d in (width, other))
    assert_matches(kdkernels.probabilistic_transfer_loss, pkt, student, teacher)


@pytest.mark.parametrize("deviation", [0.1, 1e-3])
def test_pkt_of_networks_that_nearly_agree(deviation):
    teacher = torch.randn(16, 24)
    student = (teacher + deviation * torch.randn(16, 24)).requires_grad_()
    loss, (gradient, _) = loss_and_gradients(kdkernels.probabilistic_transfer_loss, student, teacher)
    expected, (correct, _) = loss_and_gradients(pkt, *exactly(student, teacher))
    assert_close(loss, expected, "loss")
    assert_close(gradient, correct, "gradient")


def test_pkt_of_zero_equal_and_opposite_rows():
    student, teacher = torch.randn(6, 4), torch.randn(6, 4)
    student[0] = 0
    student[1] = student[2]
    student[3] = -student[4]
    for rows, others in ((student, teacher), (teacher, student)):
        rows = rows.clone().requires_grad_()
        loss = kdkernels.probabilistic_transfer_loss(rows, others)
        loss.backward()
        assert loss.isfinite()
        assert rows.grad.isfinite().all()
        assert rows.grad.abs().max() < 1e3
    rows = student.clone().requires_grad_()
    kdkernels.probabilistic_transfer_loss(rows, teacher).backward()
    assert torch.equal(rows.grad[0], torch.zeros(4))


def test_pkt_module():
    student, teacher = torch.rand(5, 4), torch.rand(5, 6)
    expected = kdkernels.probabilistic_transfer_loss(student, teacher)
    assert torch.equal(kdkernels.nn.ProbabilisticTransferLoss()(student, teacher), expected)


def test_pkt_misuse_is_explained():
    with pytest.raises(ValueError, match="teacher must have student's batch size 2, got 3"):
        kdkernels.probabilistic_transfer_loss(torch.ones(2, 3), torch.ones(3, 3))
    with pytest.raises(ValueError, match="eps must be a number >= 0"):
        kdkernels.probabilistic_transfer_loss(torch.ones(2, 3), torch.ones(2, 3), eps=-1)


def test_hint(backend):
    """The loss is the mean of all squared differences, for any pooled size."""
    for size in (8, 4):
        student, teacher = torch.randn(3, 5, 4, 4, requires_grad=True), torch.randn(3, 5, size, size)
        assert_matches(
            lambda s, t: kdkernels.hint_loss(s, t, backend=backend),
            lambda s, t: F.mse_loss(s, F.adaptive_avg_pool2d(t, 4)),
            student,
            teacher,
        )


def test_hint_module_trains_its_regressor():
    loss = kdkernels.nn.HintLoss(3, 7)
    loss(torch.randn(2, 3, 4, 4), torch.randn(2, 7, 8, 8)).backward()
    assert all(p.grad.abs().sum() > 0 for p in loss.regressor.parameters())


def test_hint_misuse_is_explained():
    with pytest.raises(ValueError, match="teacher must have student's 3 channels, got 4"):
        kdkernels.hint_loss(torch.ones(2, 3, 4, 4), torch.ones(2, 4, 4, 4))
