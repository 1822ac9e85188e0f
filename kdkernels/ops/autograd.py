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
