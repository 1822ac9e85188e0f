"""Cross-layer distillation with semantic calibration (SemCKD)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..ops.feature_mse import feature_mse
from ..ops.gram import gram

__all__ = ["cross_layer_mse", "similarity_matrices"]


def similarity_matrices(features: Sequence[Tensor], *, backend: str = "auto", group: object | None = None) -> Tensor:
    """The pairwise similarity matrices of several layers in one call (SemCKD Eq. 8).

    ``A_l = R(F_l) R(F_l)ᵀ``, where R flattens each sample: plain dot products, not normalised.

    Args:
        features: L tensors, b x ... each; sizes and strides may differ from layer to layer. float32, float64, bfloat16
            or float16, read as they are: half precision is accumulated in float32 and does not overflow.
        backend: "auto", "reference", "native" or "triton".
        group: a torch.distributed process group over which the batch is spread.

    Returns:
        L x b x b in float32 (float64 if any features are), differentiable. With a group, the rows of this rank's
        samples: L x b x B, with a column for each of the B samples of all ranks, in the order of the ranks.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what it got.
        RuntimeError: when a backend asked for by name cannot run.

    Memory: the matrices; on the CPU, per thread, one b x b and scratch of at most 1 MiB + b x 2 KiB; in CUDA 400
        tiles of 64 x 64 and at most the matrices once more; for the gradients one tensor of each layer that receives
        one and, in CUDA, the matrices once more. Saved for backward: the features themselves.
    """
    if group is not None:
        from ..ops.gram.distributed import gram as over_ranks

        return over_ranks(features, backend, group)
    return gram(features, backend=backend)


def cross_layer_mse(
    projected: Sequence[Sequence[Tensor]],
    targets: Sequence[Sequence[Tensor]],
    weights: Tensor,
    *,
    reduction: str = "mean",
    backend: str = "auto",
    group: object | None = None,
) -> Tensor:
    """The weighted mean-square error of all pairs of a student layer and a teacher layer (SemCKD Eq. 7).

    ``Σ_i Σ_j Σ_n weights[n, i, j] · MSE(targets[i][j][n], projected[i][j][n])``, the MSE of one sample being its mean
    over channels and positions. Where two maps differ in height or width, the larger is averaged down to the smaller
    (adaptive average pooling) as it is read.

    Args:
        projected: projected[i][j] is b x c x h x w, the features of student layer i projected for teacher layer j.
        targets: targets[i][j] is b x c x h' x w' with the channels of projected[i][j]; it may be the same tensor for
            every i. Targets receive a gradient only if they require one.
            Maps are float32, float64, bfloat16 or float16 in any strides, read as they are.
        weights: b x s_L x t_L, the association of layers; differentiable.
        reduction: "sum" is Eq. 7; "mean" divides by b·s_L, the normalisation that β = 400 belongs to.
        backend: "auto", "reference", "native" or "triton".
        group: a torch.distributed process group over which the batch is spread.

    Returns:
        A scalar: float64 if any map is, else float32.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what it got.
        RuntimeError: when a backend asked for by name cannot run.

    Memory: b·s_L·t_L numbers and, on the CPU, per thread two maps of one sample; for the gradients one tensor of each
        map that receives one and, in CUDA, one of the smaller map's size where it is the larger that does. Saved for
        backward: the maps themselves, nothing of their size besides.
    """
    if group is not None:
        from ..ops.feature_mse.distributed import feature_mse as over_ranks

        return over_ranks(projected, targets, weights, reduction, backend, group)
    return feature_mse(projected, targets, weights, reduction=reduction, backend=backend)
