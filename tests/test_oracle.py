"""The oracle's own gradient, and what it says of problems one can work out by hand."""

import math

import oracle
import pytest
import torch
from helpers import relative_error


@pytest.mark.parametrize("settings", [{}, {"threshold": 0.5}, {"threshold": 0.5, "partition": "resize"}])
def test_gradient_is_the_derivative(settings):
    student, teacher = torch.randn(2, 2, 4, 6).double(), torch.randn(2, 3, 6, 6).double()
    mask = torch.rand(2, 6, 6).double() if settings else None
    settings = {**settings, "mask": mask, "weights": torch.rand(3).tolist(), "reduction": "mean"}
    inputs, step = (student, teacher), 1e-5
    _, gradients = oracle.local_correlation_loss(student, teacher, 2, **settings)
    for features, gradient in zip(inputs, gradients, strict=True):
        direction = torch.randn_like(features)
        ends = []
        for sign in (1, -1):
            moved = [x + sign * step * direction if x is features else x for x in inputs]
            ends.append(oracle.local_correlation_loss(*moved, 2, **settings)[0])
        assert relative_error((ends[0] - ends[1]) / (2 * step), (gradient * direction).sum()) < 1e-6


def test_two_images_of_one_patch():
    angle = math.pi / 3
    student = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]]).view(2, 2, 1, 1)
    teacher = torch.tensor([[0.0, 2.0], [0.0, 7.0]]).view(2, 2, 1, 1)
    total, _ = oracle.local_correlation_loss(student, teacher, 1, reduction="sum")
    assert total == pytest.approx(2 * (1 - math.cos(angle)) ** 2)
    loss, _ = oracle.local_correlation_loss(student, teacher, 1)  # over n² = 4 pairs of images
    assert loss == pytest.approx(total / 4)


def test_a_dead_patch_counts_its_diagonal_twice():
    student, teacher = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    student[..., 0, 0] = 0
    # Cosines of the dead patch: with itself 0 for 1, in Eqs. 4 and 5; with three others, in both orders, in Eq. 4.
    loss, _ = oracle.local_correlation_loss(student, teacher, 2)
    assert loss == pytest.approx(2 + 6)


def test_eager_agrees():
    student, teacher = torch.randn(3, 2, 4, 4).double(), torch.randn(3, 5, 6, 2).double()
    assert (
        relative_error(oracle.eager(student, teacher, 2), oracle.local_correlation_loss(student, teacher, 2)[0]) < 1e-12
    )
