"""Similarity matrices of many layers in one call: dot products of a batch's samples, over all their features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import checks, native
from ...types import Backend
from ..operator import Operator
from ..row_masks import zeroed
from . import fake, reference

GRAM = Operator(
    "gram",
    kernels=(fake.gram, fake.gram_backward),
    memory="the gradients",
    over_ranks="all ranks' features in each pass, and the similarities' gradients",
)


def gram(features: Sequence[Tensor], *, mask: Tensor | None = None, backend: Backend = "auto") -> Tensor:
    """Return the L x b x b dot products of L layers; see ``kdkernels.similarity_matrices``."""
    layers = [in_memory_order(layer) for layer in check(features, mask)]
    chosen = GRAM.choose(backend, layers[0])
    return GRAM.result(chosen, layers, (), _reference, (_matrices, _gradients))


def check(features: object, mask: Tensor | None = None) -> list[Tensor]:
    """Check every argument. Return the layers, with zeros for the samples that do not count."""
    if isinstance(features, Tensor) or not isinstance(features, Sequence):
        raise TypeError(f"features must be a sequence of tensors, one per layer, got {type(features).__name__}")
    if not features:
        raise ValueError("features must hold at least one layer, got an empty sequence")
    for i, layer in enumerate(features):
        checks.tensor(f"features[{i}]", layer, None, "b x ...")
        checks.same_batch(f"features[{i}]", layer, "features[0]", features[0])
        checks.same_device(f"features[{i}]", layer, "features[0]", features[0])
    checks.sample_mask(mask, "features[0]", features[0])
    return list(features) if mask is None else zeroed(mask, features)


def in_memory_order(layer: Tensor) -> Tensor:
    """Return a view whose dimensions after the first go from the slowest to the fastest in memory.

    A dot product does not depend on the order of its terms, and memory order is read fastest.
    """
    if layer.is_contiguous():
        return layer
    if torch.compiler.is_compiling():  # torch.compile cannot sort unknown strides
        channels_last = layer.dim() == 4 and layer.is_contiguous(memory_format=torch.channels_last)
        return layer.permute(0, 2, 3, 1) if channels_last else layer
    strides = layer.stride()
    order = sorted(range(1, layer.dim()), key=lambda d: -strides[d])
    return layer.permute(0, *order)


def _reference(*layers: Tensor) -> Tensor:
    return reference.gram(layers)


def _matrices(
    constants: tuple[str], layers: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[tuple[Tensor], Sequence[Tensor], tuple[str]]:
    (backend,) = constants
    return (fake.gram.registered(backend)(layers, native.allows_tf32()),), layers, constants


def _gradients(
    grad: Tensor, layers: Sequence[Tensor], constants: tuple[str], wanted: Sequence[bool]
) -> list[Tensor | None]:
    (backend,) = constants
    places = [i for i, want in enumerate(wanted) if want]
    first, count = places[0], len(places)
    if places == list(range(first, first + count)):  # as where the student's layers come first
        grad = grad[first : first + count]
    else:
        grad = torch.stack([grad[i] for i in places])
    rows = fake.gram_backward.registered(backend)(grad, [layers[i] for i in places], native.allows_tf32())
    grads: list[Tensor | None] = [None] * len(layers)
    for place, gradient in zip(places, rows, strict=True):
        grads[place] = gradient.view(layers[place].shape)
    return grads
