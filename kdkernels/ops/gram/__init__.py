"""Similarity matrices of many layers in one call: dot products of a batch's samples, over all their features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import backends, checks
from . import reference


def gram(features: Sequence[Tensor], *, backend: str = "auto") -> Tensor:
    """The L x b x b dot products of L layers; see ``kdkernels.similarity_matrices``."""
    features = check(features)
    run = {"reference": _reference}[backends.choose("reference" if backend == "auto" else backend, features[0])]
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
