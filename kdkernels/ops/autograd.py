"""What the operators' autograd functions share."""

from __future__ import annotations

import torch
from torch import Tensor


class FirstDerivative(torch.autograd.Function):
    """Pass a gradient on, and raise if it is differentiated in turn.

    ``once_differentiable`` raises only where the incoming gradient requires grad: a penalty on the gradient of a sum
    would silently lose its derivative. The anchor is a saved output of the forward pass, by which the graph goes on.
    """

    @staticmethod
    def forward(ctx, gradient: Tensor, anchor: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, _: Tensor) -> None:
        raise RuntimeError("kdkernels losses have no second derivative; use backend='reference' for one")


def scaled(grad_loss: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient computed in the forward pass and saved as one of its outputs, times the gradient of the loss."""
    with torch.no_grad():
        result = (grad_loss * gradient).to(dtype)
    return FirstDerivative.apply(result, gradient) if torch.is_grad_enabled() else result
