"""Losses that the methods are trained beside or compared with."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..native import accumulation_dtype
from ..ops.feature_mse import feature_mse
from ..ops.kd import kd
from ..ops.rkd import rkd
from ..ops.similarity_preserving import similarity_preserving

__all__ = [
    "attention_transfer_loss",
    "hint_loss",
    "kd_loss",
    "logit_mse_loss",
    "probabilistic_transfer_loss",
    "relational_kd_loss",
    "similarity_preserving_loss",
    "teacher_free_kd_loss",
]


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    scale: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Knowledge distillation (LKD Eq. 1): batch mean of KL(softmax(teacher / T) ‖ softmax(student / T)).

    Args:
        student_logits: b x K.
        teacher_logits: b x K; receives a gradient only if it requires one.
        temperature: T > 0.
        scale: multiply by T², which keeps the gradient's size independent of T.
        backend: "auto", "reference", "native" or "triton".

    Returns:
        A scalar: float64 if either input is, else float32.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what it got.
        RuntimeError: when a backend asked for by name cannot run.

    Memory: the gradient, b x K, before and after it is scaled.
    """
    return kd(student_logits, teacher_logits, temperature=temperature, scale=scale, backend=backend)


def teacher_free_kd_loss(
    student_logits: Tensor,
    own_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 0.9,
    temperature: float = 4.0,
    scale: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Teacher-free distillation by self-training, Tf-KD_self (Yuan et al. 2020; ICCT's column Tf-KD).

    ``(1 − α)·cross_entropy + α·kd_loss``, where the teacher is an earlier copy of the student itself: the same network,
    trained with cross-entropy before, then frozen. The paper's generations take the student of one as the copy for the
    next.

    Args:
        student_logits: b x K.
        own_logits: b x K, of the frozen earlier copy on the same images.
        labels: b class indices.
        alpha: the share of the earlier copy, in [0, 1].
        temperature, scale, backend: as in ``kd_loss``.

    Returns:
        A scalar: float64 if either network's logits are, else float32.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what it got.
        RuntimeError: when a backend asked for by name cannot run.

    Memory: four times b x K.
    """
    checks.fraction("alpha", alpha)
    soft = kd(student_logits, own_logits, temperature=temperature, scale=scale, backend=backend)
    checks.labels(labels, student_logits.shape[0])
    with torch.autocast(student_logits.device.type, enabled=False):
        return (1 - alpha) * F.cross_entropy(student_logits.to(soft.dtype), labels) + alpha * soft


def logit_mse_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Logit transfer, LT (Ba and Caruana 2014): the mean over all b·K logits of (z_S − z_T)².

    Args:
        student_logits: b x K, float32, float64, bfloat16 or float16.
        teacher_logits: b x K; receives a gradient only if it requires one.

    Returns:
        A scalar: float64 if either input is, else float32.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what it got.

    Memory: the gradient, b x K; of half precision float32 copies besides.
    """
    checks.logits(student_logits, teacher_logits)
    dtype = accumulation_dtype(student_logits, teacher_logits)
    with torch.autocast(student_logits.device.type, enabled=False):
        return F.mse_loss(student_logits.to(dtype), teacher_logits.to(dtype))


def attention_transfer_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    reduction: str = "mean",
    eps: float = 1e-12,
) -> Tensor:
    """Activation-based attention transfer, AT (Zagoruyko and Komodakis 2017), with the maps they found best: sums of
    squares.

    A map's attention is ``Q = Σ_channels f²``, flattened and divided by its norm. The loss is the squared difference
    ``(Q_S − Q_T)²``, summed over stages: averaged over images and positions as in the authors' program ("mean"), or
    averaged over images only ("sum"), which does not shrink with the map. Where the two sizes differ, attention is
    averaged down to the smaller height and the smaller width.

    Args:
        student: n x c x h x w features, or a sequence of them, one per stage. Channels, height and width may differ
            from the teacher's. float32, float64, bfloat16 or float16, any strides.
        teacher: the teacher's features of the same stages. They receive a gradient only if they require one.
        reduction: "mean" or "sum" over positions.
        eps: attention of this norm or less is no attention: 0 everywhere, with gradient 0.

    Returns:
        A scalar: float64 if any features are, else float32.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what it got.

    Memory: the gradient twice, and a few maps of attention, n x h x w.
    """
    checks.one_of("reduction", reduction, ("mean", "sum"))
    checks.non_negative("eps", eps)
    loss = 0.0
    for s, t in _stages(student, teacher):
        size = min(s.shape[2], t.shape[2]), min(s.shape[3], t.shape[3])
        with torch.autocast(s.device.type, enabled=False):
            squares = (_attention(s, size, eps) - _attention(t, size, eps)).square().sum(1)
            loss = loss + squares.mean() / (size[0] * size[1] if reduction == "mean" else 1)
    return loss


def similarity_preserving_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    reduction: str = "mean",
    form: str = "auto",
    backend: str = "auto",
    group: object | None = None,
) -> Tensor:
    """Similarity-preserving distillation, SP (Tung and Mori 2019).

    ``loss = (1/n²) ‖Q_S − Q_T‖²``, where Q is the Gram matrix ``A Aᵀ`` of a batch's flattened activations with each row
    divided by its L2 norm.

    Args:
        student: n x ... features, maps or embeddings: each sample's are flattened. float32, float64, bfloat16 or
            float16, any strides.
        teacher: n x ... features, of any other size. Receives a gradient only if it requires one.
        reduction: "mean" over the n² entries is the paper's; "sum".
        form: "gram" holds the n x n matrices, "feature" works on d x d sums, linear in the batch; "auto" takes the
            cheaper.
        backend: "auto", "reference", "native" or "triton".
        group: a torch.distributed process group over which the batch is spread.

    Returns:
        A scalar: float64 if either network's features are, else float32. A sample whose row of the Gram matrix has norm
        <= 1e-12 has the zero row and gradient 0 through it.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what it got.
        RuntimeError: when a backend asked for by name cannot run.

    Memory: 2·n·d_S numbers, the gradient before and after it is scaled, and two strips of min(n, 512) x n (Gram form);
    or n (3·d_S + 2·d_T) numbers and three d x d sums (feature form). A teacher that learns takes 2·n·d_T more; a packed
    copy is made of features that are not dense float32 or float64 rows. Triton's Gram form holds two n x n matrices,
    reads the features as they are, and adds up parts of small matrices in at most 8 MiB.
    """
    if group is not None:
        from ..ops.similarity_preserving.distributed import similarity_preserving as over_ranks

        return over_ranks(student, teacher, reduction, form, backend, group)
    return similarity_preserving(student, teacher, reduction=reduction, form=form, backend=backend)


def _stages(student: object, teacher: object) -> list[tuple[Tensor, Tensor]]:
    """The maps of both networks, stage by stage."""
    students, teachers = ([x] if isinstance(x, Tensor) else list(x) for x in (student, teacher))
    if not students or len(students) != len(teachers):
        raise ValueError(f"teacher must have student's {len(students)} stages (at least 1), got {len(teachers)}")
    for s, t in zip(students, teachers, strict=True):
        checks.tensor("student", s, 4, "n x c x h x w")
        checks.tensor("teacher", t, 4, "n x c x h x w")
        checks.same_batch("teacher", t, "student", s)
        checks.same_device("teacher", t, "student", s)
    return list(zip(students, teachers, strict=True))


def _attention(features: Tensor, size: tuple[int, int], eps: float) -> Tensor:
    """Normalised sums of squares over channels, averaged down to ``size``; n x (h·w)."""
    # The norm reads half precision as it is and has gradient 0 at 0. Attention has no scale, so that of large maps is
    # divided by before it is squared: squares of squares of 1e10 overflow.
    lengths = torch.linalg.vector_norm(features, dim=1, dtype=accumulation_dtype(features))
    largest = lengths.detach().amax((1, 2), keepdim=True).clamp(min=1)
    squares = (lengths / largest).square()
    for axis, length in zip((1, 2), size, strict=True):
        if squares.shape[axis] != length:
            squares = torch.tensordot(squares, _averaging(squares.shape[axis], length, squares), dims=([axis], [1]))
            squares = squares.movedim(2, axis)
    squares = squares.flatten(1)
    norms = torch.linalg.vector_norm(squares, dim=1, keepdim=True)
    alive = ~(norms * largest[:, :, 0].square() <= eps)
    return torch.where(alive, squares / torch.where(alive, norms, 1.0), 0.0)


def _averaging(length: int, shorter: int, like: Tensor) -> Tensor:
    """The shorter x length matrix of adaptive average pooling, whose own gradient does not repeat bitwise on GPUs."""
    position, target = torch.arange(length), torch.arange(shorter)[:, None]
    begin, end = target * length // shorter, -(-(target + 1) * length // shorter)
    inside = ((position >= begin) & (position < end)).to(like)
    return inside / inside.sum(1, keepdim=True)


def hint_loss(student: Tensor, teacher: Tensor, *, backend: str = "auto") -> Tensor:
    """FitNet's hint (Romero et al. 2015): the mean over all elements of (student − teacher)².

    Args:
        student: b x c x h x w features, brought to the teacher's channels by a regressor; ``nn.HintLoss`` holds one.
        teacher: b x c x h' x w' features. Where height or width differ, the larger map is averaged down to the smaller.
            It receives a gradient only if it requires one. Both are float32, float64, bfloat16 or float16, any strides.
        backend: "auto", "reference", "native" or "triton".

    Returns:
        A scalar: float64 if either input is, else float32.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what it got.
        RuntimeError: when a backend asked for by name cannot run.

    Memory: the gradient, and per thread two maps of one sample.
    """
    checks.maps(student, teacher)
    weights = student.new_ones((student.shape[0], 1, 1), dtype=accumulation_dtype(student, teacher))
    return feature_mse([[student]], [[teacher]], weights, backend=backend)


def relational_kd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    backend: str = "auto",
    group: object | None = None,
) -> Tensor:
    """Relational knowledge distillation, RKD (Park et al. 2019): distances and angles between the samples of a batch.

    ``distance_weight · mean_ij ℓ(d_ij / mean(d)) + angle_weight · mean_ijk ℓ(cos ∠ x_i x_j x_k)``, where ℓ is the
    smooth L1 distance between student and teacher, the mean of the distances is that of the positive ones, and the
    cosine is 0 where x_i or x_k lies on x_j. Equal samples therefore give no gradient to each other.

    Args:
        student: b x d embeddings, float32, float64, bfloat16 or float16, any strides.
        teacher: b x d' embeddings; they receive a gradient only if they require one.
        distance_weight: of the distances, 0 leaves them out.
        angle_weight: of the angles, 0 leaves them out.
        backend: "auto", "reference", "native" or "triton".
        group: a torch.distributed process group over which the batch is spread. Every process gathers the embeddings
            of all and computes the whole loss.

    Returns:
        A scalar: float64 if either input is, else float32.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what it got.
        RuntimeError: when a backend asked for by name cannot run.

    Memory: five b x b matrices and b (2·d_S + d_T) numbers in float64, and the gradient before and after it is scaled;
    never b³, nor b x b x d. A teacher that learns takes one matrix more.
    """
    if group is not None:
        from ..ops.rkd.distributed import rkd as over_ranks

        return over_ranks(student, teacher, distance_weight, angle_weight, backend, group)
    return rkd(student, teacher, distance_weight=distance_weight, angle_weight=angle_weight, backend=backend)


def probabilistic_transfer_loss(
    student: Tensor, teacher: Tensor, *, eps: float = 1e-8, group: object | None = None
) -> Tensor:
    """Probabilistic knowledge transfer, PKT (Passalis and Tefas 2018): KL between the samples' affinities.

    With cosines turned to affinities ``(1 + cos) / 2`` and every row of them divided by its sum, the loss is
    ``mean_ij p_ij log(p_ij / q_ij)``, p being the teacher's and q the student's.

    Args:
        student: b x d embeddings, float32, float64, bfloat16 or float16.
        teacher: b x d' embeddings; they receive a gradient only if they require one.
        eps: embeddings of this norm or less have cosine 0 with everything and gradient 0. Affinities are kept from
            falling below it, where samples point in opposite directions.
        group: a torch.distributed process group over which the batch is spread. Every process gathers the embeddings
            of all and computes the whole loss.

    Returns:
        A scalar: float64 if either input is, else float32.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what it got.

    Memory: at most eight b x b matrices and b·max(6·d_S, 2·d_S + 3·d_T) numbers in float64: networks that
    nearly agree have a loss of which float32 keeps no digits.
    """
    checks.embeddings(student, teacher)
    checks.non_negative("eps", eps)
    if group is not None:
        return _probabilistic_transfer_over_ranks(student, teacher, eps, group)
    with torch.autocast(student.device.type, enabled=False):
        log_q, log_p = (_log_affinities(rows.double(), eps) for rows in (student, teacher))
        loss = F.kl_div(log_q, log_p, reduction="sum", log_target=True) / log_p.numel()
    return loss.to(accumulation_dtype(student, teacher))


def _probabilistic_transfer_over_ranks(student: Tensor, teacher: Tensor, eps: float, group: object) -> Tensor:
    from .. import distributed

    x, y = (rows.to(accumulation_dtype(rows)) for rows in (student, teacher))
    widths = {"student's width": x.shape[1], "teacher's width": y.shape[1]}
    ranks = distributed.meet(group, len(x), x.device, **widths, eps=eps, dtype=(x.dtype, y.dtype))
    return distributed.loss_of_all_rows(ranks, functools.partial(probabilistic_transfer_loss, eps=eps), x, y)


def _log_affinities(rows: Tensor, eps: float) -> Tensor:
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    alive = ~(norms <= eps)
    unit = torch.where(alive, rows / torch.where(alive, norms, 1), 0)
    affinities = ((1 + unit @ unit.T) / 2).clamp(min=max(eps, torch.finfo(rows.dtype).tiny))
    return affinities.log() - affinities.sum(1, keepdim=True).log()
