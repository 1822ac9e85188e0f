"""Inter-class correlation transfer (ICCT)."""

from __future__ import annotations

from torch import Tensor

from ..ops import icc

__all__ = ["inter_class_correlation", "inter_class_correlation_loss"]


def inter_class_correlation(logits: Tensor, *, backend: str = "auto") -> Tensor:
    """The inter-class correlation map of a batch (ICCT Eqs. 5-6).

    For one sample's logits ``z``, ``A = z zᵀ`` and ``P_ij = exp(A_ij) / Σ_l exp(A_il)``; the map is ``M = (1/b) Σ P``.

    Args:
        logits: b x K, float32, float64, bfloat16 or float16, any strides.
        backend: "auto", "reference", "native" or "triton".

    Returns:
        K x K in float32 (float64 for float64 logits), differentiable; its rows sum to 1.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what it got.
        RuntimeError: when a backend asked for by name cannot run.

    Memory: the map, K²; with the gradient a few times b x K more.
    """
    return icc.icc_map(logits, backend=backend)


def inter_class_correlation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    per_sample: bool = False,
    reduction: str = "mean",
    backend: str = "auto",
    group: object | None = None,
) -> Tensor:
    """Divergence of the student's inter-class correlation map from the teacher's: KL(M_T ‖ M_S) (ICCT Eqs. 5-7).

    ICCT's total is ``cross_entropy + λ·loss``; ICCT + SP and ICCT + AT add ``similarity_preserving_loss`` or
    ``attention_transfer_loss``. Computed in logarithms: finite for all logits whose products are, however confident.

    Args:
        student_logits: b x K, float32, float64, bfloat16 or float16, any strides.
        teacher_logits: b x K; receives a gradient only if it requires one.
        per_sample: take the KL of every sample's own P and average over the batch, as in the paper's gradients (Eq. 8).
        reduction: "sum" over the K² entries, or "mean" over the K rows, each of which is a distribution.
        backend: "auto", "reference", "native" or "triton".
        group: a torch.distributed process group over which the batch is spread.

    Returns:
        A scalar: float64 if either input is, else float32.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what it got.
        RuntimeError: when a backend asked for by name cannot run.

    Memory: 4 + t times b x K on t threads: the logits of both networks, t partial gradients, and the gradient before
    and after it is scaled. A teacher that learns takes 2 + t more. Never b·K², nor K²; but over a group a
    few times K² in float64, of more than 2048 classes some rows of the maps at a time.
    """
    if group is not None:
        from ..ops.icc.distributed import icc_loss as over_ranks

        return over_ranks(student_logits, teacher_logits, per_sample, reduction, backend, group)
    return icc.icc_loss(student_logits, teacher_logits, per_sample=per_sample, reduction=reduction, backend=backend)
