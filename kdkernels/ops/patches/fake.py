"""The schemas of ``patches`` and the shapes of its results."""

from __future__ import annotations

from torch import Tensor

from ..operator import kernel
from ..shapes import accumulation_dtype, new_maps
from .boundary import check_patches, check_patches_backward


@kernel(
    "patches(Tensor features, int k, Tensor? mask, float? threshold, bool resize, float eps)"
    " -> (Tensor rows, Tensor norms)",
    check=check_patches,
)
def patches(
    features: Tensor, k: int, mask: Tensor | None, threshold: float | None, resize: bool, eps: float
) -> tuple[Tensor, Tensor]:
    n, c, h, w = features.shape
    dtype = accumulation_dtype(features)
    rows = features.new_empty((n * k * k, c * -(-h // k) * -(-w // k)), dtype=dtype)
    return rows, features.new_empty((n * k * k,), dtype=dtype)


@kernel(
    "patches_backward(Tensor grad_rows, Tensor rows, Tensor norms, int[] shape, int k, Tensor? mask,"
    " float? threshold, bool resize) -> Tensor grad_features",
    check=check_patches_backward,
)
def patches_backward(
    grad_rows: Tensor,
    rows: Tensor,
    norms: Tensor,
    shape: list[int],
    k: int,
    mask: Tensor | None,
    threshold: float | None,
    resize: bool,
) -> Tensor:
    return new_maps(rows, shape, k)
