"""The schemas of ``feature_mse`` and the shapes of its results."""

from __future__ import annotations

from torch import Tensor

from ..operator import kernel
from ..shapes import accumulation_dtype, map_shape, new_like
from .boundary import check_feature_mse, check_feature_mse_backward


@kernel(
    "feature_mse(Tensor[] projected, Tensor[] targets, Tensor weights, float scale) -> (Tensor loss, Tensor errors)",
    check=check_feature_mse,
)
def feature_mse(projected: list[Tensor], targets: list[Tensor], weights: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(*projected, *targets)
    return weights.new_empty((), dtype=dtype), weights.new_empty(weights.shape, dtype=dtype)


@kernel(
    "feature_mse_backward(Tensor grad_loss, Tensor[] projected, Tensor[] targets, Tensor weights, float scale,"
    " int[] wanted) -> Tensor[] grads",
    check=check_feature_mse_backward,
)
def feature_mse_backward(
    grad_loss: Tensor,
    projected: list[Tensor],
    targets: list[Tensor],
    weights: Tensor,
    scale: float,
    wanted: list[int],
) -> list[Tensor]:
    orders = [map_shape(maps)[3] for maps in projected]
    return [
        new_like(maps, maps.shape, channels_last) if want else maps.new_empty((0,))
        for maps, channels_last, want in zip([*projected, *targets], [*orders, *orders], wanted, strict=True)
    ]
