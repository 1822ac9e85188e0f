"""Local correlation consistency (LKD): the loss, and the correlations that it compares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks, groups
from ..ops import local_correlation as _local_correlation
from ..ops.local_correlation.reference import correlation
from ..ops.patches import patches
from ..ops.patches.reference import split_first
from ..types import PARTITIONS, RELATIONS, Backend, FormName, Group, LocalReduction, Partition, Relation

__all__ = ["local_correlation", "local_correlation_loss"]


def local_correlation_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    k: int | Sequence[int],
    *,
    weights: Sequence[float] = (1.0, 1.0, 1.0),
    mask: Tensor | Sequence[Tensor] | None = None,
    threshold: float | None = None,
    partition: Partition = "exact",
    reduction: LocalReduction = "batchmean",
    eps: float = 1e-8,
    form: FormName = "auto",
    backend: Backend = "auto",
    group: Group = None,
) -> Tensor:
    """Return how far the patch correlations of two networks are apart (LKD Eqs. 4-7, with a mask Eq. 10).

    Every map is split into k x k patches, N = n·k² in a batch. ``D`` is the difference of the two networks' N x N
    matrices of cosines between patches. The loss is
    ``w₁·ΣD²[same image] + w₂·ΣD²[same position] + w₃·ΣD²[neither]``, summed over stages.

    Args:
        student: n x c x h x w features, or a sequence of them, one per stage. Channels, height and width may differ
            from the teacher's. float32, float64, bfloat16 or float16, any strides.
        teacher: the teacher's features of the same stages. They receive a gradient only if they require one.
        k: patches per side, one number or one per stage.
        weights: (intra, inter_same, inter_diff), the factors of Eqs. 4, 5 and 6 in Eq. 7.
        mask: n x h x w or n x 1 x h x w attention in [0, 1] at the teacher's resolution, one per stage (Eq. 9).
        threshold: crop to the tight box of ``mask > threshold`` and resample to the original size. None does not crop.
        partition: "exact" needs k to divide height and width. "resize" resamples the crop bilinearly to the next
            multiple and splits it. "split" is the paper's order: it splits the crop and resamples each patch. PyTorch
            cuts these patches, and the kernels compare them.
        reduction: "batchmean" divides the sum by n², as Eq. 2 does; n counts the images of all ranks. The paper's β
            (0.001 to 0.1) fits this reduction only. "sum" is Eqs. 4-7 as they stand. "mean" divides each relation by
            its own number of pairs.
        eps: a patch with a norm of at most eps has cosine 0 with every patch, and its gradient is 0.
        form: "gram" works on tiles of the N x N matrices. "feature" works on d x d sums, linear in the batch. "auto"
            takes the cheaper form for each term.
        backend: "auto", "reference", "native", "triton" or "library"; see ``kdkernels.use_backend``.
        group: the process group that shares the batch, "world" for the default group, or None for one process.

    Returns:
        A scalar: float64 if an input is float64, otherwise float32.

    Raises:
        TypeError: if an argument has the wrong type. The message names the argument, what was expected and what it got.
        ValueError: if a shape or a setting does not fit, with the same parts in the message.
        RuntimeError: if the named backend cannot run here. The message says why.

    Memory:
        2·N·d_S numbers of every stage, the gradient before and after it is scaled. One stage at a time takes a packed
        matrix per network, N (d_S + d_T), and min(N, 512)·N numbers (Gram form) or the largest d x d sum (feature
        form). A teacher that learns takes 2·N·d_T more. No tensor of N² exists.

    Examples:
        >>> import torch
        >>> from kdkernels import local_correlation_loss
        >>> student, teacher = torch.randn(8, 16, 8, 8, requires_grad=True), torch.randn(8, 64, 8, 8)
        >>> local_correlation_loss(student, teacher, k=4).backward()
        >>> student.grad.shape
        torch.Size([8, 16, 8, 8])
    """
    threshold = None if threshold is None else checks.finite("threshold", threshold)
    settings = _local_correlation.Settings(threshold, partition, checks.non_negative("eps", eps), form)
    stages, settings = _local_correlation.check(student, teacher, sides(k), weights, mask, reduction, settings)
    group = groups.resolve(group)
    if group is not None:
        from ..ops.local_correlation.distributed import local_correlation_loss as over_ranks

        return over_ranks(stages, settings, backend, group)
    return _local_correlation.local_correlation_loss(stages, settings, backend)


def local_correlation(
    features: Tensor,
    k: int,
    relation: Relation = "full",
    *,
    partition: Partition = "exact",
    eps: float = 1e-8,
    backend: Backend = "auto",
) -> Tensor:
    """Return the cosines between patches that the loss compares (LKD Eq. 3).

    Args:
        features: n x c x h x w, float32, float64, bfloat16 or float16, any strides.
        k: patches per side. N = n·k².
        relation: "full" is N x N over all pairs. "intra" is n x k² x k² within each image. "inter_same" is k² x n x n
            between images at each position. "inter_diff" is N x N, where pairs of one image or one position are 0.
        partition: "exact", "resize" or "split", as in ``local_correlation_loss``.
        eps: a patch with a norm of at most eps has cosine 0 with every patch.
        backend: what computes the patches: "auto", "reference", "native", "triton" or "library".

    Returns:
        The matrix or matrices, float64 for float64 features, otherwise float32. They are differentiable.

    Raises:
        TypeError: if an argument has the wrong type. The message names the argument, what was expected and what it got.
        ValueError: if a shape or a setting does not fit, with the same parts in the message.
        RuntimeError: if the named backend cannot run here. The message says why.

    Memory:
        The result is what the loss avoids: N² numbers for "full", and a few times as many for "inter_diff".

    Examples:
        >>> import torch
        >>> from kdkernels import local_correlation
        >>> local_correlation(torch.randn(8, 64, 8, 8), k=4, relation="intra").shape
        torch.Size([8, 16, 16])
    """
    checks.one_of("relation", relation, RELATIONS)
    k, eps = checks.positive_int("k", k), checks.non_negative("eps", eps)
    checks.one_of("partition", partition, PARTITIONS)
    if partition == "split":
        features, partition = (
            split_first(checks.tensor("features", features, 4, "n x c x h x w"), k, None, None),
            "exact",
        )
    rows = patches(features, k, partition=partition, eps=eps, backend=backend)
    with torch.autocast(rows.device.type, enabled=False):
        return correlation(rows, k * k, relation)


def sides(k: int | Sequence[int]) -> int | list[int]:
    """Return the patches per side, one number or a list with one for each stage."""
    if isinstance(k, Sequence) and not isinstance(k, str):
        return [checks.positive_int("k", side) for side in k]
    return checks.positive_int("k", k)
