"""Losses of logits that papers compare with: decoupled distillation (DKD), and correlations (DIST)."""

from __future__ import annotations

from torch import Tensor

from .. import groups
from ..ops.dist import dist
from ..ops.dkd import dkd
from ..types import Backend, Group, LabelReduction

__all__ = ["dist_loss", "dkd_loss"]


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    reduction: LabelReduction = "mean",
    mask: Tensor | None = None,
    ignore_index: int = -100,
    backend: Backend = "auto",
) -> Tensor:
    """Return the decoupled distillation loss, DKD (Zhao et al. 2022, Eq. 7).

    The loss is ``T² (α·TCKD + β·NCKD)``, with probabilities softened by T. TCKD is the KL divergence of two numbers:
    the probability of the label, and the probability of all other classes together. NCKD is the KL divergence of the
    probabilities of the other classes among themselves. ``kd_loss`` weights NCKD by the teacher's probability of the
    other classes, which is small for a confident teacher. DKD's total is ``cross_entropy + dkd_loss``.

    Args:
        student_logits: ... x K, float32, float64, bfloat16 or float16, any strides. A class that has -inf in both
            networks is not there: the loss equals the loss without it.
        teacher_logits: ... x K. They receive a gradient only if they require one. -inf only in the teacher is the
            probability 0. -inf only in the student makes the loss infinite.
        labels: class indices of shape ..., of any integer dtype.
        alpha: the weight of TCKD.
        beta: the weight of NCKD. The paper takes 8 for most pairs of networks on CIFAR-100.
        temperature: T > 0.
        reduction: "mean" over the rows that count, as in the authors' program, "sum" over them, or "none" for the loss
            of each row. There, a row that does not count has the loss 0.
        mask: bool of shape ..., True for the rows that count, or None for all. A loss without a row is 0.
        ignore_index: rows with this label do not count, as in ``torch.nn.functional.cross_entropy``.
        backend: "auto", "reference", "native", "triton" or "library"; see ``kdkernels.use_backend``.

    Returns:
        A scalar, or shape ... for "none": float64 if an input is float64, otherwise float32.

    Raises:
        TypeError: if an argument has the wrong type. The message names the argument, what was expected and what it got.
        ValueError: if a shape, a setting or a label does not fit, with the same parts in the message. A label that is
            no class is found on the CPU only. On a GPU, a check would wait for the device: there, the loss is NaN.
        RuntimeError: if the named backend cannot run here. The message says why.

    Memory:
        The gradient, N x K, before and after it is scaled.

    Examples:
        >>> import torch
        >>> from kdkernels import dkd_loss
        >>> student, teacher = torch.randn(64, 100, requires_grad=True), torch.randn(64, 100)
        >>> dkd_loss(student, teacher, torch.randint(100, (64,)), alpha=1.0, beta=8.0).backward()
        >>> student.grad.shape
        torch.Size([64, 100])
    """
    return dkd(
        student_logits,
        teacher_logits,
        labels,
        alpha=alpha,
        beta=beta,
        temperature=temperature,
        reduction=reduction,
        mask=mask,
        ignore_index=ignore_index,
        backend=backend,
    )


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    backend: Backend = "auto",
    group: Group = None,
) -> Tensor:
    """Return how far two networks' probabilities are from correlated, DIST (Huang et al. 2022, Eqs. 7-9).

    ``Y = softmax(logits / T)``. The inter-class term is 1 - the mean over rows of Pearson's correlation of the row in
    both networks. The intra-class term is the same over columns: it compares how one class varies over the samples.
    The loss is ``T² (β·inter + γ·intra)``. DIST's total is ``cross_entropy + dist_loss``.

    Args:
        student_logits: ... x K, float32, float64, bfloat16 or float16, any strides. All leading dimensions are
            samples. A class that has -inf in both networks is not in its row: the loss equals the loss without it.
        teacher_logits: ... x K. They receive a gradient only if they require one. -inf in one network is the
            probability 0.
        beta: the weight of the inter-class term.
        gamma: the weight of the intra-class term.
        temperature: T > 0, the authors' ``tau``.
        mask: bool of shape ..., True for the rows that count, or None for all. A loss without a row is 0.
        backend: "auto", "reference", "native", "triton" or "library"; see ``kdkernels.use_backend``.
        group: the process group that shares the batch, "world" for the default group, or None for one process.
            Every process gathers all logits and computes the whole loss, because a column has rows of all processes.

    Returns:
        A scalar: float64 if an input is float64, otherwise float32. As in the authors' program, 1e-8 is added to the
        product of two norms, so a row or column without variation has the correlation 0.

    Raises:
        TypeError: if an argument has the wrong type. The message names the argument, what was expected and what it got.
        ValueError: if a shape or a setting does not fit, with the same parts in the message.
        RuntimeError: if the named backend cannot run here. The message says why.

    Memory:
        Both networks' probabilities, 2·N·K numbers, and the gradient, N x K, before and after it is scaled.

    Examples:
        >>> import torch
        >>> from kdkernels import dist_loss
        >>> student, teacher = torch.randn(64, 100, requires_grad=True), torch.randn(64, 100)
        >>> dist_loss(student, teacher, beta=1.0, gamma=1.0).backward()
        >>> student.grad.shape
        torch.Size([64, 100])
    """
    group = groups.resolve(group)
    if group is not None:
        from ..ops.dist.distributed import dist as over_ranks

        return over_ranks(student_logits, teacher_logits, beta, gamma, temperature, mask, backend, group)
    return dist(
        student_logits,
        teacher_logits,
        beta=beta,
        gamma=gamma,
        temperature=temperature,
        mask=mask,
        backend=backend,
    )
