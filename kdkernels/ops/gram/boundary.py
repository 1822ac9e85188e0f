"""What ``gram`` and ``gram_backward`` expect of their arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...boundary import FULL_FLOATS, Check


def check_gram(features: Sequence[Tensor]) -> None:
    _features(Check("gram"), features)


def check_gram_backward(grad_matrices: Tensor, features: Sequence[Tensor]) -> None:
    check = Check("gram_backward")
    _features(check, features)
    check.bind("L", len(features))
    check.tensor("grad_matrices", grad_matrices, "L b b", FULL_FLOATS)
    # Layers in float32 take a float64 gradient, because autograd leaves out float64 layers that need no gradient.
    for i, layer in enumerate(features):
        if layer.dtype == torch.float64:
            check.same_type("grad_matrices", grad_matrices, f"features[{i}]", layer)


def _features(check: Check, features: Sequence[Tensor]) -> None:
    check.not_empty("features", features)
    for i, layer in enumerate(features):
        name = f"features[{i}]"
        check.tensor(name, layer, "b ...")
        batch, depth = layer.shape[0], math.prod(layer.shape[1:])
        check.fits(name, len(features), batch, batch)
        check.fits(name, len(features), depth)
        check.fits_gpu(name, "samples", batch)
        check.fits_gpu(name, "features of a sample", depth)
