"""Local correlation consistency (LKD)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks
from ..ops import local_correlation as _local_correlation
from ..ops.local_correlation.reference import RELATIONS, correlation
from ..ops.patches import patches

__all__ = ["local_correlation", "local_correlation_loss"]


def local_correlation_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    k: int | Sequence[int],
    *,
    weights: Sequence[float] = (1.0, 1.0, 1.0),
    mask: Tensor | Sequence[Tensor] | None = None,
    threshold: float | None = None,
    partition: str = "exact",
    reduction: str = "sum",
    eps: float = 1e-8,
    form: str = "auto",
    backend: str = "auto",
    group: object | None = None,
) -> Tensor:
    """Local correlation consistency between two networks (LKD Eqs. 4-7, with a mask Eq. 10).

    Every map is split into k x k patches; with ``D`` the difference of the two networks' N x N matrices of cosines
    between patches (N = n·k²), ``loss = w₁·ΣD²[same image] + w₂·ΣD²[same position] + w₃·ΣD²[neither]``, summed
    over stages.

    Args:
        student: n x c x h x w features, or a sequence of them, one per stage. Channels, height and width may differ
            from the teacher's. float32, float64, bfloat16 or float16, any strides.
        teacher: the teacher's features of the same stages. They receive a gradient only if they require one.
        k: patches per side, one number or one per stage.
        weights: (intra, inter_same, inter_diff), the factors of Eqs. 4, 5 and 6 in Eq. 7.
        mask: n x h x w (or n x 1 x h x w) attention in [0, 1] at the teacher's resolution, one per stage (Eq. 9).
        threshold: crop to the tight box of ``mask > threshold`` and resample to the original size; None does not crop.
        partition: "exact" wants k to divide height and width; "resize" first resamples bilinearly to the next multiple.
        reduction: "sum" is the paper's; "mean" divides each relation by its own number of pairs.
        eps: patches of this norm or less have cosine 0 with everything and gradient 0.
        form: "gram" works on tiles of the N x N matrices, "feature" on d x d sums, linear in the batch; "auto" takes
            the cheaper for each term.
        backend: "auto", "reference", "native" or "triton".
        group: a torch.distributed process group over which the batch is spread.

    Returns:
        A scalar: float64 if either network's features are, else float32.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what it got.
        RuntimeError: when a backend asked for by name cannot run.

    Memory: 2·N·d_S numbers of every stage, the gradient before and after it is scaled; of one stage at a time a packed
    matrix of each network, N (d_S + d_T), and min(N, 512)·N (Gram form) or the largest d x d sum (feature form); never
    N². A teacher that learns takes 2·N·d_T more.
    """
    settings = _local_correlation.Settings(threshold, partition, eps, form)
    stages = _local_correlation.check(student, teacher, k, weights, mask, reduction, settings)
    if group is not None:
        from ..ops.local_correlation.distributed import local_correlation_loss as over_ranks

        return over_ranks(stages, settings, backend, group)
    return _local_correlation.local_correlation_loss(stages, settings, backend)


def local_correlation(
    features: Tensor,
    k: int,
    relation: str = "full",
    *,
    partition: str = "exact",
    eps: float = 1e-8,
    backend: str = "auto",
) -> Tensor:
    """The cosine correlations between patches themselves (LKD Eq. 3), for inspection.

    Args:
        features: n x c x h x w.
        k: patches per side; N = n·k².
        relation: "full" N x N over all pairs; "intra" n x k² x k² within each image; "inter_same" k² x n x n between
            images at each position; "inter_diff" N x N with the pairs of one image or one position set to 0.
        partition, eps, backend: as in ``local_correlation_loss``; the backend is that of the patches.

    Returns:
        The matrix or matrices in float32 (float64 for float64 features), differentiable.

    Memory: the result is what the loss avoids holding: N² numbers for "full", and a few times as many for "inter_diff".
    """
    checks.one_of("relation", relation, RELATIONS)
    rows = patches(features, k, partition=partition, eps=eps, backend=backend)
    with torch.autocast(rows.device.type, enabled=False):
        return correlation(rows, k * k, relation)
