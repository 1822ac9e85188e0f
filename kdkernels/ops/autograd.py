"""What the operators' autograd functions share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import backends


class FirstDerivative(torch.autograd.Function):
    """Pass a gradient on, and raise if it is differentiated in turn.

    ``once_differentiable`` raises only where the incoming gradient requires grad: a penalty on the gradient of a sum
    would silently lose its derivative. The anchors, by which the graph goes on, are inputs of the forward pass or
    outputs that it saved.
    """

    @staticmethod
    def forward(ctx, gradient: Tensor, *anchors: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, _: Tensor) -> None:
        raise RuntimeError("kdkernels losses have no second derivative; use backend='reference' for one")


def once(gradient: Tensor, *anchors: Tensor) -> Tensor:
    """A gradient that raises if it is differentiated; as it is where nothing is recorded anyway."""
    return FirstDerivative.apply(gradient, *anchors) if torch.is_grad_enabled() else gradient


def scaled(grad_loss: Tensor, gradient: Tensor, dtype: torch.dtype, *anchors: Tensor) -> Tensor:
    """A gradient computed in the forward pass, times the gradient of the loss; its own anchor if none is given."""
    if not torch.is_grad_enabled():  # as in every backward pass that does not ask for a graph
        return (grad_loss * gradient).to(dtype)
    with torch.no_grad():
        result = (grad_loss * gradient).to(dtype)
    return once(result, *(anchors or (gradient,)))


def recomputed(function: Callable[..., Tensor], *inputs: object) -> Tensor:
    """``function``, whose intermediate results are computed again for the gradient instead of kept.

    The transforms of torch.func and torch.export cannot do so: there they are kept.
    """
    if backends.transformed() or backends.exporting():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False)


def times(factor: float, loss: Callable[[float], Tensor]) -> Tensor:
    """``loss(factor)``, a loss that is multiplied by a number inside; by one that may depend on the size of the batch.

    Operators take plain numbers, for each of which torch.compile would make a graph of its own: there it is multiplied
    outside.
    """
    return factor * loss(1.0) if torch.compiler.is_compiling() else loss(factor)
