"""Every loss under torch.compile with changing sizes, torch.export, autocast with a GradScaler; second derivatives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import assert_close
from torch import Tensor, nn

from kdkernels import nn as losses


class Step(nn.Module):
    """A student, a frozen teacher and a loss between them: the smallest training step."""

    def __init__(self, loss: nn.Module, of_maps: bool) -> None:
        super().__init__()
        self.student, self.teacher = (nn.Conv2d(3, width, 3, padding=1) for width in (4, 6 if of_maps else 4))
        self.teacher.requires_grad_(False)
        self.loss, self.of_maps = loss, of_maps

    def forward(self, images: Tensor) -> Tensor:
        student, teacher = self.student(images), self.teacher(images)
        if not self.of_maps:
            student, teacher = student.mean((2, 3)), teacher.mean((2, 3))
        return self.loss(student, teacher)


LOSSES: dict[str, Callable[[], Step]] = {
    "kd": lambda: Step(losses.KDLoss(), False),
    "local_correlation": lambda: Step(losses.LocalCorrelationLoss(2), True),
    "correlation_congruence": lambda: Step(losses.CorrelationCongruenceLoss(), False),
    "correlation_congruence bilinear": lambda: Step(losses.CorrelationCongruenceLoss(kernel="bilinear"), False),
    "icc": lambda: Step(losses.InterClassCorrelationLoss(), False),
    "similarity_preserving": lambda: Step(losses.SimilarityPreservingLoss(), True),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def run(module: Callable[[Tensor], Tensor], parameters: list[Tensor], images: Tensor) -> list[Tensor]:
    loss = module(images)
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


@pytest.mark.parametrize("name", ["local_correlation", "correlation_congruence", "icc"])
def test_compiled_for_changing_sizes(name):
    step = LOSSES[name]().double()
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    parameters = list(step.student.parameters())
    for batch in (5, 3, 9):
        images = torch.randn(batch, 3, 4, 4, dtype=torch.float64)
        for found, expected in zip(run(compiled, parameters, images), run(step, parameters, images), strict=True):
            assert_close(found, expected, name)


@every_loss
def test_exported(name):
    step, images = LOSSES[name](), torch.randn(5, 3, 4, 4)
    with torch.no_grad():  # autograd functions are not part of an exported program
        exported = torch.export.export(step, (images,)).module()
        assert_close(exported(images), step(images), name)


@every_loss
def test_mixed_precision_with_a_scaler(name):
    """Gradients of a loss scaled by 2^8 are those of the loss once they are unscaled."""
    step = LOSSES[name]()
    images = torch.randn(6, 3, 4, 4)
    for dtype in (torch.bfloat16, torch.float16):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        optimizer = torch.optim.SGD(step.student.parameters(), 0.0)

        def backward(scale: Callable[[Tensor], Tensor], dtype: torch.dtype = dtype) -> list[Tensor]:
            step.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = step(images)
            assert loss.dtype == torch.float32
            scale(loss).backward()
            return [parameter.grad.clone() for parameter in step.student.parameters()]

        plain = backward(lambda loss: loss)
        backward(scaler.scale)
        scaler.unscale_(optimizer)
        for parameter, expected in zip(step.student.parameters(), plain, strict=True):
            assert parameter.grad.isfinite().all()
            difference = (parameter.grad - expected).norm()
            assert difference <= 4 * torch.finfo(dtype).eps * expected.norm() + 1e-5  # half precision is spaced by 6e-8


@every_loss
def test_a_second_derivative_raises_or_is_right(name):
    step = LOSSES[name]()
    parameters = list(step.student.parameters())
    grads = torch.autograd.grad(step(torch.randn(4, 3, 4, 4)), parameters, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(sum(grad.square().sum() for grad in grads), parameters)
