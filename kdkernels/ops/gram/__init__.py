"""Similarity matrices of many layers in one call: dot products of a batch's samples, over all their features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import backends, checks, native
from ..autograd import once
from . import reference


def gram(features: Sequence[Tensor], *, backend: str = "auto") -> Tensor:
    """The L x b x b dot products of L layers; see ``kdkernels.similarity_matrices``."""
    features = check(features)
    run = {"reference": _reference, "native": _native, "triton": _triton}[backends.choose(backend, features[0])]
    return run(features)


def check(features: object) -> list[Tensor]:
    if isinstance(features, Tensor) or not isinstance(features, Sequence):
        raise TypeError(f"features must be a sequence of tensors, one per layer, got {type(features).__name__}")
    if not features:
        raise ValueError("features must hold at least one layer, got an empty sequence")
    for i, layer in enumerate(features):
        checks.tensor(f"features[{i}]", layer, None, "b x ...")
        checks.same_batch(f"features[{i}]", layer, "features[0]", features[0])
        checks.same_device(f"features[{i}]", layer, "features[0]", features[0])
    return list(features)


def _reference(features: list[Tensor]) -> Tensor:
    # Autocast would run the products in half precision.
    with torch.autocast(features[0].device.type, enabled=False):
        return reference.gram(features)


def _native(features: list[Tensor]) -> Tensor:
    layers = [in_memory_order(layer) for layer in features]
    if torch.is_grad_enabled() and any(layer.requires_grad for layer in layers):
        return Gram.apply(native.ops, *layers)
    return native.ops.gram(layers, native.allows_tf32())


def _triton(features: list[Tensor]) -> Tensor:
    from .triton import gram as run

    return run([in_memory_order(layer) for layer in features])


def in_memory_order(layer: Tensor) -> Tensor:
    """A view whose dimensions after the first are those of the layer from the slowest to the fastest in memory.

    A dot product does not depend on the order of its terms, and memory is read fastest as it lies.
    """
    if layer.is_contiguous():
        return layer
    if torch.compiler.is_compiling():  # which cannot sort strides that it does not know
        channels_last = layer.dim() == 4 and layer.is_contiguous(memory_format=torch.channels_last)
        return layer.permute(0, 2, 3, 1) if channels_last else layer
    order = sorted(range(1, layer.dim()), key=lambda d: -layer.stride(d))
    return layer.permute(0, *order)


class Gram(torch.autograd.Function):
    """The matrices by the operators of ``ops``, native ones or Triton's."""

    @staticmethod
    def forward(ctx, ops, *layers):
        ctx.save_for_backward(*layers)
        ctx.ops = ops
        return ops.gram(layers, native.allows_tf32())

    @staticmethod
    def backward(ctx, grad_matrices):
        layers = ctx.saved_tensors
        wanted = [i for i, want in enumerate(ctx.needs_input_grad[1:]) if want]
        with torch.no_grad():
            grads = iter(_gradients(ctx.ops, grad_matrices, layers, wanted))
        return None, *(
            once(next(grads).view(layer.shape), layer) if want else None
            for layer, want in zip(layers, ctx.needs_input_grad[1:], strict=True)
        )


def _gradients(ops, grad_matrices: Tensor, layers: Sequence[Tensor], wanted: list[int]) -> list[Tensor]:
    """Those of the layers that want one."""
    first, count = wanted[0], len(wanted)
    if wanted == list(range(first, first + count)):  # as where the student's layers come first
        grad_matrices = grad_matrices[first : first + count]
    else:
        grad_matrices = torch.stack([grad_matrices[i] for i in wanted])
    return ops.gram_backward(grad_matrices, [layers[i] for i in wanted], native.allows_tf32())
