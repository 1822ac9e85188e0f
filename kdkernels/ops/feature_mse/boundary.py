"""What ``feature_mse`` and ``feature_mse_backward`` expect of their arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ...boundary import FULL_FLOATS, Check


def check_feature_mse(projected: Sequence[Tensor], targets: Sequence[Tensor], weights: Tensor, scale: float) -> None:
    _pairs(Check("feature_mse"), projected, targets, weights, scale)


def check_feature_mse_backward(
    grad_loss: Tensor,
    projected: Sequence[Tensor],
    targets: Sequence[Tensor],
    weights: Tensor,
    scale: float,
    wanted: Sequence[int],
) -> None:
    check = Check("feature_mse_backward")
    _pairs(check, projected, targets, weights, scale)
    check.tensor("grad_loss", grad_loss, "", FULL_FLOATS)
    check.flags("wanted", wanted, 2 * len(projected))


def _pairs(check: Check, projected: Sequence[Tensor], targets: Sequence[Tensor], weights: Tensor, scale: float) -> None:
    check.tensor("weights", weights, "b s_L t_L")
    pairs = math.prod(weights.shape[1:])
    check.holds("projected", projected, pairs, "maps, one for each of a sample's weights")
    check.holds("targets", targets, pairs, "maps, one for each of a sample's weights")
    for p, (own, target) in enumerate(zip(projected, targets, strict=True)):
        check.forget(3)
        check.tensor(f"projected[{p}]", own, "b c h_S w_S")
        check.tensor(f"targets[{p}]", target, "b c h_T w_T")
        for name, maps in ((f"projected[{p}]", own), (f"targets[{p}]", target)):
            check.fits(name, 2, pairs, math.prod(maps.shape[1:]))
            check.fits_gpu(name, "numbers in a sample", *maps.shape[1:])
    check.finite("scale", scale)
