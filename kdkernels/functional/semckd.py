"""Cross-layer distillation with semantic calibration (SemCKD): its similarity matrices and its loss."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import groups
from ..ops.feature_mse import feature_mse
from ..ops.gram import gram
from ..types import Backend, Group, Reduction

__all__ = ["cross_layer_mse", "similarity_matrices"]


def similarity_matrices(
    features: Sequence[Tensor], *, mask: Tensor | None = None, backend: Backend = "auto", group: Group = None
) -> Tensor:
    """Return the pairwise similarity matrices of several layers in one call (SemCKD Eq. 8).

    ``A_l = R(F_l) R(F_l)ᵀ``, where R flattens each sample. These are plain dot products without normalisation.

    Args:
        features: L tensors, b x ... each. Sizes and strides may differ from layer to layer. They are float32, float64,
            bfloat16 or float16, and are read as they are. Half precision is accumulated in float32 and does not
            overflow.
        mask: b bools, True for each sample that counts. The rows and columns of the other samples are 0, and these
            samples have gradient 0, whatever they hold. None counts all samples.
        backend: "auto", "reference", "native", "triton" or "library"; see ``kdkernels.use_backend``.
        group: the process group that shares the batch, "world" for the default group, or None for one process.

    Returns:
        An L x b x b tensor, float64 if an input is float64, otherwise float32. It is differentiable. With a group, it
        has the rows of this process's samples: L x b x B, with a column for each of the B samples of all processes, in
        the order of the ranks.

    Raises:
        TypeError: if an argument has the wrong type. The message names the argument, what was expected and what it got.
        ValueError: if a shape or a setting does not fit, with the same parts in the message.
        RuntimeError: if the named backend cannot run here. The message says why.

    Memory:
        The matrices. On the CPU, each thread takes one b x b matrix and at most 1 MiB + b x 2 KiB. In CUDA, the tiles
        take 400 x 64 x 64 numbers, and at most the matrices once more. The gradients take one tensor of each layer that
        receives one and, in CUDA, the matrices once more. Backward keeps the features themselves. A mask takes a
        copy of the features, which backward keeps.

    Examples:
        >>> import torch
        >>> from kdkernels import similarity_matrices
        >>> similarity_matrices([torch.randn(8, 16, 8, 8), torch.randn(8, 32, 4, 4)]).shape
        torch.Size([2, 8, 8])
    """
    group = groups.resolve(group)
    if group is not None:
        from ..ops.gram.distributed import gram as over_ranks

        return over_ranks(features, mask, backend, group)
    return gram(features, mask=mask, backend=backend)


def cross_layer_mse(
    projected: Sequence[Sequence[Tensor]],
    targets: Sequence[Sequence[Tensor]],
    weights: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
    group: Group = None,
) -> Tensor:
    """Return the weighted mean squared error of all pairs of a student layer and a teacher layer (SemCKD Eq. 7).

    The loss is ``Σ_i Σ_j Σ_n weights[n, i, j] · MSE(targets[i][j][n], projected[i][j][n])``. The MSE of a sample is its
    mean over channels and positions. Where two maps differ in height or width, the larger is averaged down to the
    smaller while it is read (adaptive average pooling).

    Args:
        projected: ``projected[i][j]`` is b x c x h x w, the features of student layer i projected for teacher layer j.
            Maps are float32, float64, bfloat16 or float16 in any strides, and are read as they are.
        targets: ``targets[i][j]`` is b x c x h' x w' with the channels of ``projected[i][j]``. It may be the same
            tensor for every i. Targets receive a gradient only if they require one.
        weights: b x s_L x t_L, the association of layers. It is differentiable.
        mask: b bools, True for each sample that counts. The result equals the result of the batch without the other
            samples, whatever these hold. None counts all samples.
        reduction: "sum" is Eq. 7. "mean" divides by b·s_L. The published β = 400 belongs to "mean".
        backend: "auto", "reference", "native", "triton" or "library"; see ``kdkernels.use_backend``.
        group: the process group that shares the batch, "world" for the default group, or None for one process.

    Returns:
        A scalar: float64 if an input is float64, otherwise float32.

    Raises:
        TypeError: if an argument has the wrong type. The message names the argument, what was expected and what it got.
        ValueError: if a shape or a setting does not fit, with the same parts in the message.
        RuntimeError: if the named backend cannot run here. The message says why.

    Memory:
        b·s_L·t_L numbers. On the CPU, each thread takes two maps of one sample. The gradients take one tensor of each
        map that receives one. In CUDA, a larger map that receives a gradient takes one tensor of the smaller map's size
        too. Backward keeps the maps themselves, and nothing else of their size. A mask takes a copy of the maps, which
        backward keeps.

    Examples:
        >>> import torch
        >>> from kdkernels import cross_layer_mse
        >>> projected = [[torch.randn(8, 16, 4, 4, requires_grad=True), torch.randn(8, 32, 4, 4, requires_grad=True)]]
        >>> targets = [[torch.randn(8, 16, 8, 8), torch.randn(8, 32, 4, 4)]]
        >>> cross_layer_mse(projected, targets, torch.full((8, 1, 2), 0.5)).backward()
        >>> projected[0][0].grad.shape
        torch.Size([8, 16, 4, 4])
    """
    group = groups.resolve(group)
    if group is not None:
        from ..ops.feature_mse.distributed import feature_mse as over_ranks

        return over_ranks(projected, targets, weights, mask, reduction, backend, group)
    return feature_mse(projected, targets, weights, mask=mask, reduction=reduction, backend=backend)
