"""Weighted mean squared errors over the samples of all ranks. Only their sum and their number are exchanged."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.distributed import ProcessGroup

from ... import distributed
from ...types import Backend, Reduction
from . import FEATURE_MSE, check
from . import feature_mse as feature_mse_of_one


def feature_mse(
    projected: Sequence[Sequence[Tensor]],
    targets: Sequence[Sequence[Tensor]],
    weights: Tensor,
    mask: Tensor | None,
    reduction: Reduction,
    backend: Backend,
    group: ProcessGroup,
) -> Tensor:
    """Return the loss of the concatenated batch; see ``kdkernels.cross_layer_mse``."""
    check(projected, targets, weights, reduction, mask)
    batch, students, teachers = weights.shape
    layers = {"number of student layers": students, "number of teacher layers": teachers}
    ranks = distributed.agree(group, batch, weights.device, **layers, reduction=reduction, masked=mask is not None)
    FEATURE_MSE.choose(backend, weights)
    own = feature_mse_of_one(projected, targets, weights, mask=mask, reduction="sum", backend=backend)
    loss = distributed.sum_over(ranks, own * (1.0 if reduction == "sum" else 1.0 / (ranks.samples * students)))
    return distributed.to_mean(ranks, loss, mask if reduction == "mean" else None)
