"""Weighted mean-square errors over the samples of all ranks: nothing but their sum and their number is exchanged."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ... import distributed
from . import check
from . import feature_mse as feature_mse_of_one


def feature_mse(
    projected: Sequence[Sequence[Tensor]],
    targets: Sequence[Sequence[Tensor]],
    weights: Tensor,
    reduction: str,
    backend: str,
    group: object,
) -> Tensor:
    """The loss of the concatenated batch; see ``kdkernels.cross_layer_mse``."""
    check(projected, targets, weights, reduction)
    batch, students, teachers = weights.shape
    layers = {"number of student layers": students, "number of teacher layers": teachers}
    ranks = distributed.meet(group, batch, weights.device, **layers, reduction=reduction)
    own = feature_mse_of_one(projected, targets, weights, reduction="sum", backend=backend)
    return distributed.sum_over(ranks, own * (1.0 if reduction == "sum" else 1.0 / (ranks.samples * students)))
