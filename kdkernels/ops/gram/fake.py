"""The schemas of ``gram`` and the shapes of its results."""

from __future__ import annotations

import math

from torch import Tensor

from ..operator import kernel
from ..shapes import accumulation_dtype
from .boundary import check_gram, check_gram_backward


@kernel("gram(Tensor[] features, bool tf32=False) -> Tensor matrices", check=check_gram)
def gram(features: list[Tensor], tf32: bool = False) -> Tensor:
    batch = features[0].shape[0]
    return features[0].new_empty((len(features), batch, batch), dtype=accumulation_dtype(*features))


@kernel(
    "gram_backward(Tensor grad_matrices, Tensor[] features, bool tf32=False) -> Tensor[] grad_features",
    check=check_gram_backward,
)
def gram_backward(grad_matrices: Tensor, features: list[Tensor], tf32: bool = False) -> list[Tensor]:
    return [layer.new_empty((layer.shape[0], math.prod(layer.shape[1:]))) for layer in features]
