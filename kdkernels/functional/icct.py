"""Inter-class correlation transfer (ICCT): the loss, and the map that it compares."""

from __future__ import annotations

import functools

from torch import Tensor

from .. import groups
from ..dtensor import by_rows, is_dtensor
from ..ops import icc
from ..types import Backend, Group, Reduction

__all__ = ["inter_class_correlation", "inter_class_correlation_loss"]


def inter_class_correlation(
    logits: Tensor, *, mask: Tensor | None = None, class_mask: Tensor | None = None, backend: Backend = "auto"
) -> Tensor:
    """Return the inter-class correlation map of a batch (ICCT Eqs. 5-6).

    For the logits ``z`` of one sample, ``A = z zᵀ`` and ``P_ij = exp(A_ij) / Σ_l exp(A_il)``. The map is
    ``M = (1/b) Σ P``.

    Args:
        logits: b x K, float32, float64, bfloat16 or float16, any strides.
        mask: b bools, True for each sample that counts. The map equals the map of the batch without the other samples,
            whatever these hold. None counts all samples. Without a sample, the map is 0.
        class_mask: K bools, True for each class that is there. The map of these classes equals the map of the logits
            without the other classes, and the other rows and columns are 0. None has all classes.
        backend: "auto", "reference", "native", "triton" or "library"; see ``kdkernels.use_backend``.

    Returns:
        A K x K matrix, float64 for float64 logits, otherwise float32. Its rows sum to 1. It is differentiable.

    Raises:
        TypeError: if an argument has the wrong type. The message names the argument, what was expected and what it got.
        ValueError: if a shape or a setting does not fit, with the same parts in the message.
        RuntimeError: if the named backend cannot run here. The message says why.

    Memory:
        The map, K². The gradient takes a few times b x K more. Masks take a copy of the logits. With a mask, a kernel
        waits once for a GPU, to read how many samples and classes there are. A CUDA graph cannot capture it.

    Examples:
        >>> import torch
        >>> from kdkernels import inter_class_correlation
        >>> correlation = inter_class_correlation(torch.randn(64, 10))
        >>> correlation.shape, torch.allclose(correlation.sum(1), torch.ones(10))
        (torch.Size([10, 10]), True)
    """
    return icc.icc_map(logits, mask=mask, class_mask=class_mask, backend=backend)


def inter_class_correlation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    per_sample: bool = False,
    mask: Tensor | None = None,
    class_mask: Tensor | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
    group: Group = None,
) -> Tensor:
    """Return the divergence of the student's inter-class correlation map from the teacher's (ICCT Eqs. 5-7).

    The loss is ``KL(M_T ‖ M_S)`` of the maps of ``inter_class_correlation``. ICCT's total is ``cross_entropy +
    λ·loss``. ICCT + SP and ICCT + AT add ``similarity_preserving_loss`` or ``attention_transfer_loss``. The loss is
    computed from logarithms, so it is finite for confident logits, as long as their products are finite.

    Args:
        student_logits: b x K, float32, float64, bfloat16 or float16, any strides.
        teacher_logits: b x K. They receive a gradient only if they require one.
        per_sample: take the KL of each sample's own P and average over the batch, as in the paper's gradient (Eq. 8).
        mask: b bools, True for each sample that counts. The result equals the result of the batch without the other
            samples, whatever these hold. None counts all samples. A loss without a sample is 0.
        class_mask: K bools, True for each class that is there, for example the classes of a task. The result
            equals the result of the logits without the other classes. None has all classes. All ranks of a group need
            the same mask.
        reduction: "mean" over the K rows (each is a distribution) or "sum" over the K² entries.
        backend: "auto", "reference", "native", "triton" or "library"; see ``kdkernels.use_backend``.
        group: the process group that shares the batch, "world" for the default group, or None for one process.

    Returns:
        A scalar: float64 if an input is float64, otherwise float32.

    Raises:
        TypeError: if an argument has the wrong type. The message names the argument, what was expected and what it got.
        ValueError: if a shape or a setting does not fit, with the same parts in the message.
        RuntimeError: if the named backend cannot run here. The message says why.

    Memory:
        4 + t times b x K on t threads: the logits of both networks, t partial gradients, and the gradient before and
        after it is scaled. A teacher that learns takes 2 + t times more. No tensor of b·K² or K² exists. With a group,
        the loss takes a few times K² in float64. For more than 2048 classes it takes some rows of the maps at a time.
        Masks take a copy of the logits. With a mask, a kernel waits once for a GPU, to read how many samples and
        classes there are. A CUDA graph cannot capture it.

    Examples:
        >>> import torch
        >>> from kdkernels import inter_class_correlation_loss
        >>> student, teacher = torch.randn(64, 100, requires_grad=True), 30 * torch.randn(64, 100)
        >>> inter_class_correlation_loss(student, teacher).backward()
        >>> bool(student.grad.isfinite().all())
        True
    """
    group = groups.resolve(group)
    if group is not None:
        from ..ops.icc.distributed import icc_loss as over_ranks

        return over_ranks(student_logits, teacher_logits, per_sample, reduction, backend, group, mask, class_mask)
    if per_sample and (is_dtensor(student_logits) or is_dtensor(teacher_logits)):
        loss = functools.partial(
            inter_class_correlation_loss, per_sample=True, class_mask=class_mask, reduction=reduction, backend=backend
        )
        return by_rows(loss, mask=mask, student_logits=student_logits, teacher_logits=teacher_logits)
    return icc.icc_loss(
        student_logits,
        teacher_logits,
        per_sample=per_sample,
        reduction=reduction,
        mask=mask,
        class_mask=class_mask,
        backend=backend,
    )
