"""Shared by the autograd functions of the operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard, overload

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import backends


class FirstDerivative(torch.autograd.Function):
    """Pass a gradient on, and raise an error if it is differentiated again.

    ``once_differentiable`` raises only if the incoming gradient requires grad. A penalty on the gradient of a sum would
    silently lose its derivative. The anchors are saved tensors. Through them, the result belongs to the graph.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *anchors: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> None:
        raise RuntimeError("kdkernels losses have no second derivative; use backend='reference' for one")


def differentiable_once(gradient: Tensor, *anchors: Tensor) -> Tensor:
    """Return a gradient that raises an error if it is differentiated, in case a graph of the backward pass
    is recorded.
    """
    return FirstDerivative.apply(gradient, *anchors) if torch.is_grad_enabled() else gradient


class LossWithGradients(torch.autograd.Function):
    """A loss, of the batch or of each row, whose kernel also computes the gradients. Backward only scales them.

    Labels and masks have no gradient. The kernel takes a flag for each of the other tensors, the networks' outputs.

    The gradients are outputs of the function. PyTorch frees saved outputs after the backward pass, so a sum of losses
    keeps nothing else alive. A loss may be changed in place, for example by ``loss += other``.
    """

    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., Any], settings: tuple[Any, ...], last: tuple[Any, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [x.dtype if differentiable(x) else None for x in tensors]
        wanted = [want for want, dtype in zip(ctx.needs_input_grad[3:], ctx.dtypes, strict=True) if dtype]
        loss, *gradients = run(*tensors, *settings, *wanted, *last)
        gradients = [gradient for gradient, want in zip(gradients, wanted, strict=True) if want]
        ctx.save_for_backward(*gradients)
        return loss, *gradients

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:  # what is differentiated does not depend on the loss
            return (None,) * (3 + len(ctx.dtypes))
        saved = iter(ctx.saved_tensors)
        gradients = [
            scaled(grad_loss, next(saved), dtype) if wanted else None
            for dtype, wanted in zip(ctx.dtypes, ctx.needs_input_grad[3:], strict=True)
        ]
        return None, None, None, *gradients


def scaled(grad_loss: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale a saved gradient, which the forward pass computed, by the incoming gradient.

    Out of place, because a second backward pass scales the same gradient again.
    """
    if grad_loss.dim():  # one loss per row
        grad_loss = grad_loss[:, None]
    if not torch.is_grad_enabled():  # as in every backward pass without create_graph
        return (grad_loss * gradient).to(dtype)
    with torch.no_grad():
        result = (grad_loss * gradient).to(dtype)
    return differentiable_once(result, gradient)


# Of (constants, tensors, wanted): the results, the tensors to save, and other values to keep.
ForwardRule = Callable[[Any, Sequence[Tensor], Sequence[bool]], tuple[tuple[Tensor, ...], Sequence[Tensor | None], Any]]
# Of (gradient, saved, kept, wanted): the gradient to every tensor.
BackwardRule = Callable[[Tensor, Sequence[Any], Any, Sequence[bool]], Sequence[Tensor | None]]


class WithBackwardKernel(torch.autograd.Function):
    """A result whose gradients are computed by a backward kernel from saved tensors.

    Only the first result is differentiable. The others are saved tensors that belong to the graph.
    """

    @staticmethod
    def forward(
        ctx: Any,
        forward_rule: ForwardRule,
        backward_rule: BackwardRule,
        constants: Any,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        results, saved, ctx.kept = forward_rule(constants, tensors, ctx.needs_input_grad[3:])
        ctx.save_for_backward(*(savable(tensor) for tensor in saved))
        ctx.backward_rule = backward_rule
        ctx.dtypes = [x.dtype for x in tensors]
        return results

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        if gradient is None:  # what is differentiated does not depend on the result
            return (None,) * (3 + len(ctx.dtypes))
        saved = ctx.saved_tensors
        if not torch.is_grad_enabled():  # as in every backward pass that does not ask for a graph
            return None, None, None, *WithBackwardKernel._gradients(ctx, gradient, saved)
        with torch.no_grad():
            grads = WithBackwardKernel._gradients(ctx, gradient, saved)
        anchors = [x for x in saved if x is not None and x.requires_grad]
        return None, None, None, *(g if g is None else differentiable_once(g, *anchors) for g in grads)

    @staticmethod
    def _gradients(ctx: Any, gradient: Tensor, saved: Sequence[Tensor | None]) -> list[Tensor | None]:
        wanted = ctx.needs_input_grad[3:]
        found = _for_each(lambda one: ctx.backward_rule(one, saved, ctx.kept, wanted), gradient)
        return [
            g.to(dtype) if g is not None and want else None
            for g, dtype, want in zip(found, ctx.dtypes, wanted, strict=True)
        ]


def _for_each(run: Callable[[Tensor], Sequence[Tensor | None]], gradient: Tensor) -> Sequence[Tensor | None]:
    """Return ``run(gradient)``. Under ``is_grads_batched``, run it for one gradient of the batch after the other.

    There, PyTorch uses its own batching, for which no batching rule can be registered.
    """
    if torch.compiler.is_compiling() or not torch._C._functorch.is_legacy_batchedtensor(gradient):
        return run(gradient)
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    batch = torch._remove_batch_dim(gradient, level, 1, 0)
    calls = [run(one) for one in batch]
    return [
        None if of_one[0] is None else torch._add_batch_dim(torch.stack(list(of_one)), 0, level)
        for of_one in zip(*calls, strict=True)
    ]


@overload
def savable(tensor: Tensor) -> Tensor: ...
@overload
def savable(tensor: None) -> None: ...
def savable(tensor: Tensor | None) -> Tensor | None:
    """Return a tensor that PyTorch can save. It does not save tensors of inference_mode, such as a teacher's features,
    so these are copied.
    """
    if tensor is None or torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    return tensor.clone()


@overload
def distinct(tensors: Sequence[Tensor]) -> Sequence[Tensor]: ...
@overload
def distinct(tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]: ...
def distinct(tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Return the tensors, each as its own view under torch.compile, which passes no tensor twice to a function.

    A teacher's layer may be compared with every layer of a student.
    """
    return [x if x is None else x.view_as(x) for x in tensors] if torch.compiler.is_compiling() else tensors


def differentiable(tensor: Tensor | None) -> TypeGuard[Tensor]:
    """Return whether a tensor can have a gradient. Labels, masks and None cannot."""
    return tensor is not None and tensor.is_floating_point()


def needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def recomputed(function: Callable[..., Tensor], *inputs: object) -> Tensor:
    """Return ``function``. Its intermediate results are not kept, but computed again for the gradient.

    Under torch.func and torch.export, intermediate results are kept, because these cannot recompute.
    """
    if backends.transformed() or backends.exporting():
        return function(*inputs)
    result: Tensor = checkpoint(function, *inputs, use_reentrant=False)
    return result


def multiplied(factor: float, loss: Callable[[float], Tensor]) -> Tensor:
    """Return ``factor`` times a loss that multiplies by a number inside its kernel: ``loss(factor)``.

    A factor may depend on the batch size. A traced program would then hold only for this size, so it multiplies outside
    of the kernel.
    """
    return factor * loss(1.0) if torch.compiler.is_compiling() else loss(factor)
