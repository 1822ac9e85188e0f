"""Losses that the methods train beside their own, or compare with."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks, distributed, groups
from ..dtensor import by_rows, is_dtensor
from ..ops.autograd import savable
from ..ops.feature_mse import feature_mse
from ..ops.kd import check_settings as check_kd
from ..ops.kd import is_plain, kd, kd_of_rows
from ..ops.operator import Operator
from ..ops.rkd import rkd
from ..ops.row_masks import pairs, to_mean, zeroed
from ..ops.shapes import accumulation_dtype
from ..ops.similarity_preserving import similarity_preserving
from ..types import REDUCTIONS, Backend, DivergenceName, FormName, Group, Reduction, RowReduction

__all__ = [
    "attention_transfer_loss",
    "channel_wise_loss",
    "hint_loss",
    "kd_loss",
    "logit_mse_loss",
    "probabilistic_transfer_loss",
    "relational_kd_loss",
    "similarity_preserving_loss",
    "teacher_free_kd_loss",
]

# Losses that PyTorch computes in few kernels. Only the reference computes them, also in a block of ``use_backend``.
ATTENTION_TRANSFER = Operator("attention_transfer", (), (), False, memory="a gradient twice, and n x h x w numbers")
LOGIT_MSE = Operator("logit_mse", (), (), False, memory="the gradient, b x K")
PROBABILISTIC_TRANSFER = Operator(
    "probabilistic_transfer",
    (),
    (),
    False,
    memory="ten b x b matrices and b·max(4·d_S, 2·d_S + 2·d_T) numbers in float64",
    over_ranks="the embeddings of all ranks, B (d_S + d_T)",
)


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 4.0,
    scale: bool = True,
    dim: int = -1,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    reduction: RowReduction = "batchmean",
    divergence: DivergenceName = "forward",
    beta: float = 0.5,
    standardize: bool = False,
    teacher_indices: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Return the divergence of the softened class probabilities, KD (LKD Eq. 1).

    The default is the batch mean of ``KL(softmax(teacher / T) ‖ softmax(student / T))``, times T². A row is the logits
    of one sample, token or pixel. With p and q the softened probabilities of teacher and student, the divergence of a
    row is

    - "forward": ``KL(p ‖ q) = Σ p log(p / q)``;
    - "reverse": ``KL(q ‖ p) = Σ q log(q / p)``;
    - "jsd": ``β KL(p ‖ m) + (1 − β) KL(q ‖ m)`` with ``m = β p + (1 − β) q``, the generalised JSD of GKD (Agarwal et
      al. 2024). As in Liger-Kernel and TRL, β = 0 is "forward" and β = 1 is "reverse".

    Args:
        student_logits: b x K, or logits of any shape, with the classes in ``dim``. float32, float64, bfloat16 or
            float16, any strides.
        teacher_logits: the same shape. They receive a gradient only if they require one.
        temperature: T > 0. It may be a tensor that learns (CTKD): one number, or one per row, in any shape that
            broadcasts to the rows' shape. The loss is differentiated exactly, with the factor T².
        scale: multiply by T². Then the size of the gradient does not depend on T.
        dim: the dimension of the classes. The rows' shape is the shape of the logits without ``dim``: b x h x w for
            logits b x K x h x w with ``dim=1``.
        mask: bool, in any shape that broadcasts to the rows' shape. True marks rows that count. Other rows may hold any
            number, also NaN. Their loss and their gradient are 0.
        labels: the rows' class indices, in the rows' shape. Only ``ignore_index`` has a meaning: its rows do not count.
        ignore_index: the label of rows that do not count.
        reduction: "batchmean" divides the sum by the size of the first dimension of the rows, as PyTorch's ``kl_div``,
            RepDistiller and torchdistill do. With a mask, it divides by the number of samples in which a row counts.
            "mean" divides by the number of rows that count, as mdistiller, TRL and Liger-Kernel do. For b x K, both are
            equal. PyTorch's own "mean" also divides by K. "sum" adds the rows. "none" returns the divergence of each
            row, in the rows' shape. If no row counts, the loss is 0, with gradient 0.
        divergence: "forward", "reverse" or "jsd".
        beta: β of "jsd", in [0, 1].
        standardize: replace each row z by ``(z − mean(z)) / (std(z) + 1e-7)`` before the temperature, for both networks
            (logit standardisation, LSKD, Sun et al. 2024). The deviation divides by K − 1.
        teacher_indices: int64, if only the k most probable classes of the teacher are known: these classes,
            ... x k with the k classes in ``dim``, each class once. Then ``teacher_logits``, ... x k, holds their
            log-probabilities at the loss's temperature: ``log_softmax(z / T)`` of all K logits z, gathered. The
            temperature divides only the student's logits. All other classes are one class, in both networks.
        backend: "auto", "reference", "native", "triton" or "library"; see ``kdkernels.use_backend``.

    Returns:
        A scalar, or the rows' shape for "none": float64 if an input is float64, otherwise float32.

        A logit of -inf is an absent class. If both networks have -inf, the class is not there. If only the teacher has
        -inf, p is 0. If only the student has -inf, the forward loss is +inf. There, the gradient is the gradient of the
        finite terms to the teacher, and q − p to the student. "reverse" swaps the roles. NaN and +inf give NaN.

    Raises:
        TypeError: if an argument has the wrong type. The message names the argument, what was expected and what it got.
        ValueError: if a shape or a setting does not fit, with the same parts in the message. Numbers in a tensor, such
            as labels, are checked on the CPU only, and not by torch.compile. On a GPU, a row with a temperature below 0
            gives NaN.
        RuntimeError: if the named backend cannot run here. The message says why.

    Memory:
        The gradients, and at most 20 numbers per row. A forward KL divergence of b x K logits with less than 4,096
        classes, or on a GPU, takes the gradient twice instead. A top-k teacher takes 8·k numbers per row more. Logits
        are copied if no strides describe them as two kinds of rows and the classes, such as b x K x h x w cut from
        larger maps. With a top-k teacher, they are also copied if no strides describe them as one kind of rows.

    Examples:
        >>> import torch
        >>> from kdkernels import kd_loss
        >>> student, teacher = torch.randn(64, 100, requires_grad=True), torch.randn(64, 100)
        >>> kd_loss(student, teacher, temperature=4.0).backward()
        >>> student.grad.shape
        torch.Size([64, 100])
        >>> pixels = torch.randn(2, 2, 19, 8, 8)
        >>> kd_loss(*pixels, dim=1, mask=torch.rand(2, 8, 8) > 0.5, reduction="none").shape
        torch.Size([2, 8, 8])
    """
    plain = (
        (reduction == "batchmean" or reduction == "mean")
        and divergence == "forward"
        and mask is None
        and labels is None
        and teacher_indices is None
        and not standardize
    )
    if is_dtensor(student_logits) or is_dtensor(teacher_logits):
        if not plain or dim not in (1, -1) or isinstance(temperature, Tensor):
            raise TypeError(
                "student_logits must be a plain tensor with these settings, got a DTensor: DTensors take only "
                "temperature, scale and backend"
            )
        loss = functools.partial(kd_loss, temperature=temperature, scale=scale, backend=backend)
        return by_rows(loss, student_logits=student_logits, teacher_logits=teacher_logits)
    if plain and is_plain(student_logits, temperature, dim):
        temperature = cast(float, temperature)  # checked in the call
        return kd(student_logits, teacher_logits, temperature=temperature, scale=scale, backend=backend)
    return kd_of_rows(
        student_logits,
        teacher_logits,
        temperature=temperature,
        scale=scale,
        dim=dim,
        mask=mask,
        labels=labels,
        ignore_index=ignore_index,
        reduction=reduction,
        divergence=divergence,
        beta=beta,
        standardize=standardize,
        teacher_indices=teacher_indices,
        backend=backend,
    )


def teacher_free_kd_loss(
    student_logits: Tensor,
    own_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 0.9,
    temperature: float = 4.0,
    scale: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """Return the self-training loss of teacher-free distillation (Yuan et al. 2020; Tf-KD in ICCT's tables).

    The loss is ``(1 − α)·cross_entropy + α·kd_loss``. The teacher is an earlier copy of the student: the same network,
    trained with cross-entropy and then frozen. In the paper, the student of one generation is the copy for the next.

    Args:
        student_logits: b x K, float32, float64, bfloat16 or float16, any strides.
        own_logits: b x K, the logits of the frozen copy for the same images.
        labels: b class indices, of any integer dtype.
        alpha: the weight of the copy, in [0, 1].
        temperature: T > 0 of ``kd_loss``.
        scale: multiply the KD term by T².
        backend: "auto", "reference", "native", "triton" or "library"; see ``kdkernels.use_backend``.

    Returns:
        A scalar: float64 if an input is float64, otherwise float32.

    Raises:
        TypeError: if an argument has the wrong type. The message names the argument, what was expected and what it got.
        ValueError: if a shape or a setting does not fit, with the same parts in the message.
        RuntimeError: if the named backend cannot run here. The message says why.

    Memory:
        Four times b x K.

    Examples:
        >>> import torch
        >>> from kdkernels import teacher_free_kd_loss
        >>> student, copy = torch.randn(64, 100, requires_grad=True), torch.randn(64, 100)
        >>> teacher_free_kd_loss(student, copy, torch.randint(100, (64,)), alpha=0.9).backward()
        >>> student.grad.shape
        torch.Size([64, 100])
    """
    if is_dtensor(student_logits) or is_dtensor(own_logits):
        loss = functools.partial(
            teacher_free_kd_loss, alpha=alpha, temperature=temperature, scale=scale, backend=backend
        )
        return by_rows(loss, student_logits=student_logits, own_logits=own_logits, labels=labels)
    alpha = check_teacher_free(alpha, temperature)
    soft = kd(student_logits, own_logits, temperature=temperature, scale=scale, backend=backend)
    labels = checks.labels(labels, student_logits)
    with torch.autocast(student_logits.device.type, enabled=False):
        return (1 - alpha) * F.cross_entropy(student_logits.to(soft.dtype), labels) + alpha * soft


def check_teacher_free(alpha: float, temperature: float) -> float:
    check_kd(temperature)
    return checks.fraction("alpha", alpha)


def logit_mse_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, mask: Tensor | None = None, backend: Backend = "auto"
) -> Tensor:
    """Return the mean squared error of the logits, LT (Ba and Caruana 2014).

    The loss is the mean of ``(z_S − z_T)²`` over all b·K logits.

    Args:
        student_logits: b x K, float32, float64, bfloat16 or float16, any strides.
        teacher_logits: b x K. They receive a gradient only if they require one.
        mask: b bools, True for each sample that counts. The result equals the result of the batch without the other
            samples, whatever these hold. None counts all samples.
        backend: "auto" or "reference", because this loss has no kernels.

    Returns:
        A scalar: float64 if an input is float64, otherwise float32.

    Raises:
        TypeError: if an argument has the wrong type. The message names the argument, what was expected and what it got.
        ValueError: if a shape or a setting does not fit, with the same parts in the message.
        RuntimeError: if ``backend`` is "native" or "triton".

    Memory:
        The gradient, b x K. Half precision also takes float32 copies.

    Examples:
        >>> import torch
        >>> from kdkernels import logit_mse_loss
        >>> logit_mse_loss(torch.zeros(4, 10), 2 * torch.ones(4, 10))
        tensor(4.)
    """
    LOGIT_MSE.check_backend(backend)
    if is_dtensor(student_logits) or is_dtensor(teacher_logits):
        return by_rows(logit_mse_loss, mask, student_logits=student_logits, teacher_logits=teacher_logits)
    checks.logits(student_logits, teacher_logits)
    checks.sample_mask(mask, "student_logits", student_logits)
    LOGIT_MSE.choose("reference", student_logits)
    dtype = accumulation_dtype(student_logits, teacher_logits)
    with torch.autocast(student_logits.device.type, enabled=False):
        student, teacher = (savable(x.to(dtype)) for x in (student_logits, teacher_logits))
        if mask is not None:
            student, teacher = zeroed(mask, (student, teacher))
        return to_mean(F.mse_loss(student, teacher), mask)


def attention_transfer_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    eps: float = 1e-12,
    backend: Backend = "auto",
) -> Tensor:
    """Return the difference of the spatial attention of two networks, AT (Zagoruyko and Komodakis 2017).

    The attention of a map is ``Q = Σ_channels f²``, flattened and divided by its norm. The loss is ``(Q_S − Q_T)²``,
    summed over stages. Where the two sizes differ, the attention is averaged down to the smaller height and the smaller
    width.

    Args:
        student: n x c x h x w features, or a sequence of them, one per stage. Channels, height and width may differ
            from the teacher's. float32, float64, bfloat16 or float16, any strides.
        teacher: the teacher's features of the same stages. They receive a gradient only if they require one.
        mask: n bools, True for each sample that counts. The result equals the result of the batch without the other
            samples, whatever these hold. None counts all samples.
        reduction: "mean" over images and positions, as in the authors' program, or "sum" over positions, which does not
            shrink with the map.
        eps: attention with a norm of at most eps is 0 everywhere, and its gradient is 0.
        backend: "auto" or "reference", because this loss has no kernels.

    Returns:
        A scalar: float64 if an input is float64, otherwise float32.

    Raises:
        TypeError: if an argument has the wrong type. The message names the argument, what was expected and what it got.
        ValueError: if a shape or a setting does not fit, with the same parts in the message.
        RuntimeError: if ``backend`` is "native" or "triton".

    Memory:
        The gradient twice, and a few maps of attention, n x h x w.

    Examples:
        >>> import torch
        >>> from kdkernels import attention_transfer_loss
        >>> student, teacher = torch.randn(8, 16, 8, 8, requires_grad=True), torch.randn(8, 64, 4, 4)
        >>> attention_transfer_loss(student, teacher).backward()
        >>> student.grad.shape
        torch.Size([8, 16, 8, 8])
    """
    eps = check_attention_transfer(reduction, eps, backend)
    if isinstance(student, Tensor) and isinstance(teacher, Tensor) and (is_dtensor(student) or is_dtensor(teacher)):
        of_rows = functools.partial(attention_transfer_loss, reduction=reduction, eps=eps)
        return by_rows(of_rows, mask, student=student, teacher=teacher)
    stages = _stages(student, teacher, mask)
    ATTENTION_TRANSFER.choose("reference", stages[0][0])
    losses = []
    for s, t in stages:
        size = min(s.shape[2], t.shape[2]), min(s.shape[3], t.shape[3])
        with torch.autocast(s.device.type, enabled=False):
            squares = (_attention(s, size, eps) - _attention(t, size, eps)).square().sum(1)
            losses.append(to_mean(squares.mean(), mask) / (size[0] * size[1] if reduction == "mean" else 1))
    first, *others = losses
    return sum(others, first)


def check_attention_transfer(reduction: str, eps: float, backend: str) -> float:
    checks.one_of("reduction", reduction, REDUCTIONS)
    ATTENTION_TRANSFER.check_backend(backend)
    return checks.non_negative("eps", eps)


def similarity_preserving_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    form: FormName = "auto",
    backend: Backend = "auto",
    group: Group = None,
) -> Tensor:
    """Return how far the similarities of a batch are apart in two networks, SP (Tung and Mori 2019).

    The loss is ``(1/n²) ‖Q_S − Q_T‖²``. Q is the Gram matrix ``A Aᵀ`` of the flattened activations A of a batch, with
    each row divided by its L2 norm.

    Args:
        student: n x ... features, maps or embeddings. Each sample is flattened. float32, float64, bfloat16 or float16,
            any strides.
        teacher: n x ... features of any other size. They receive a gradient only if they require one.
        mask: n bools, True for each sample that counts. The result equals the result of the batch without the other
            samples, whatever these hold. None counts all samples.
        reduction: "mean" over the n² entries, as in the paper, or "sum".
        form: "gram" works on n x n matrices. "feature" works on d x d sums, linear in the batch. "auto" takes the
            cheaper form.
        backend: "auto", "reference", "native", "triton" or "library"; see ``kdkernels.use_backend``.
        group: the process group that shares the batch, "world" for the default group, or None for one process.

    Returns:
        A scalar: float64 if an input is float64, otherwise float32. A sample whose row of the Gram matrix has a norm of
        at most 1e-12 has the zero row, and its gradient through this row is 0.

    Raises:
        TypeError: if an argument has the wrong type. The message names the argument, what was expected and what it got.
        ValueError: if a shape or a setting does not fit, with the same parts in the message.
        RuntimeError: if the named backend cannot run here. The message says why.

    Memory:
        The Gram form takes 2·n·d_S numbers, the gradient before and after it is scaled, and two strips of
        min(n, 512) x n. The feature form takes n (3·d_S + 2·d_T) numbers and three d x d sums. A teacher that learns
        takes 2·n·d_T more. Features that are not dense float32 or float64 rows are packed into a copy. The Gram form
        in Triton holds two n x n matrices, reads the features as they are, and adds up parts of small matrices in at
        most 8 MiB. A mask takes a copy of the features.

    Examples:
        >>> import torch
        >>> from kdkernels import similarity_preserving_loss
        >>> student, teacher = torch.randn(32, 16, 8, 8, requires_grad=True), torch.randn(32, 64, 4, 4)
        >>> similarity_preserving_loss(student, teacher).backward()
        >>> student.grad.shape
        torch.Size([32, 16, 8, 8])
    """
    group = groups.resolve(group)
    if group is not None:
        from ..ops.similarity_preserving.distributed import similarity_preserving as over_ranks

        return over_ranks(student, teacher, mask, reduction, form, backend, group)
    return similarity_preserving(student, teacher, mask=mask, reduction=reduction, form=form, backend=backend)


def _stages(
    student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor], mask: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """Return the maps of both networks, stage by stage, with zeros for the samples that do not count."""
    students, teachers = ([x] if isinstance(x, Tensor) else list(x) for x in (student, teacher))
    if not students or len(students) != len(teachers):
        raise ValueError(f"teacher must have student's {len(students)} stages (at least 1), got {len(teachers)}")
    for s, t in zip(students, teachers, strict=True):
        checks.tensor("student", s, 4, "n x c x h x w")
        checks.tensor("teacher", t, 4, "n x c x h x w")
        checks.same_batch("teacher", t, "student", s)
        checks.same_device("teacher", t, "student", s)
        checks.sample_mask(mask, "student", s)
    if mask is not None:
        students, teachers = zeroed(mask, students), zeroed(mask, teachers)
    return list(zip(students, teachers, strict=True))


def _attention(features: Tensor, size: tuple[int, int], eps: float) -> Tensor:
    """Normalised sums of squares over channels, averaged down to ``size``; n x (h·w)."""
    # The norm reads half precision as it is and has gradient 0 at 0. Attention has no scale, so large maps are divided
    # before they are squared: squares of squares of 1e10 overflow.
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
    """Return the shorter x length matrix of adaptive pooling, whose own gradient does not repeat bitwise on GPUs."""
    position = torch.arange(length, device=like.device)
    target = torch.arange(shorter, device=like.device)[:, None]
    begin, end = target * length // shorter, -(-(target + 1) * length // shorter)
    inside = ((position >= begin) & (position < end)).to(like)
    return inside / inside.sum(1, keepdim=True)


def hint_loss(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, backend: Backend = "auto") -> Tensor:
    """Return the mean squared error of two feature maps, FitNet's hint (Romero et al. 2015).

    The loss is the mean of ``(student − teacher)²`` over all elements. Where height or width differ, the larger map is
    averaged down to the smaller size.

    Args:
        student: b x c x h x w features with the teacher's channels. The regressor of ``nn.HintLoss`` adapts the
            channels. float32, float64, bfloat16 or float16, any strides.
        teacher: b x c x h' x w' features. They receive a gradient only if they require one.
        mask: b bools, True for each sample that counts. The result equals the result of the batch without the other
            samples, whatever these hold. None counts all samples.
        backend: "auto", "reference", "native", "triton" or "library"; see ``kdkernels.use_backend``.

    Returns:
        A scalar: float64 if an input is float64, otherwise float32.

    Raises:
        TypeError: if an argument has the wrong type. The message names the argument, what was expected and what it got.
        ValueError: if a shape or a setting does not fit, with the same parts in the message.
        RuntimeError: if the named backend cannot run here. The message says why.

    Memory:
        The gradient, and two maps of one sample per thread. A mask takes a copy of the maps.

    Examples:
        >>> import torch
        >>> from kdkernels import hint_loss
        >>> student, teacher = torch.randn(8, 64, 8, 8, requires_grad=True), torch.randn(8, 64, 4, 4)
        >>> hint_loss(student, teacher).backward()
        >>> student.grad.shape
        torch.Size([8, 64, 8, 8])
    """
    if is_dtensor(student) or is_dtensor(teacher):
        return by_rows(functools.partial(hint_loss, backend=backend), mask, student=student, teacher=teacher)
    checks.maps(student, teacher)
    checks.sample_mask(mask, "student", student)
    weights = student.new_ones((student.shape[0], 1, 1), dtype=accumulation_dtype(student, teacher))
    return feature_mse([[student]], [[teacher]], weights, mask=mask, backend=backend)


def channel_wise_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 4.0,
    mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Return the divergence of the places that the channels of two maps look at, CWD (Shu et al. 2021, Eqs. 4-5).

    A channel becomes a distribution over its h·w positions, ``softmax(channel / T)``. The loss is T² times the mean of
    ``KL(teacher ‖ student)`` over all b·c channels. In segmentation, the maps are the logits, with a channel per class.

    Args:
        student: b x c x h x w maps with the teacher's channels, height and width. float32, float64, bfloat16 or
            float16, any strides.
        teacher: b x c x h x w maps. They receive a gradient only if they require one.
        temperature: T > 0.
        mask: b bools, True for each sample that counts. The result equals the result of the batch without the other
            samples, whatever these hold. None counts all samples.
        backend: "auto", "reference", "native", "triton" or "library"; see ``kdkernels.use_backend``.

    Returns:
        A scalar: float64 if an input is float64, otherwise float32. It is finite for all finite maps.

    Raises:
        TypeError: if an argument has the wrong type. The message names the argument, what was expected and what it got.
        ValueError: if a shape or a setting does not fit, with the same parts in the message.
        RuntimeError: if the named backend cannot run here. The message says why.

    Memory:
        The gradient, before and after it is scaled. Maps in another memory order than b x c x h x w, such as
        channels_last, are copied. A mask takes a copy of the maps.

    Examples:
        >>> import torch
        >>> from kdkernels import channel_wise_loss
        >>> student, teacher = torch.randn(2, 19, 64, 64, requires_grad=True), torch.randn(2, 19, 64, 64)
        >>> channel_wise_loss(student, teacher).backward()
        >>> student.grad.shape
        torch.Size([2, 19, 64, 64])
    """
    if is_dtensor(student) or is_dtensor(teacher):
        loss = functools.partial(channel_wise_loss, temperature=temperature, backend=backend)
        return by_rows(loss, mask, student=student, teacher=teacher)
    student, teacher = checks.maps(student, teacher)
    if student.shape[2:] != teacher.shape[2:]:
        sizes = [f"{x.shape[2]} x {x.shape[3]}" for x in (student, teacher)]
        raise ValueError(f"teacher must have student's height and width {sizes[0]}, got {sizes[1]}; resize one of them")
    checks.sample_mask(mask, "student", student)
    if mask is not None:
        student, teacher = zeroed(mask, (student, teacher))
    channels = student.shape[0] * student.shape[1]
    rows = [x.reshape(channels, x.shape[2] * x.shape[3]) for x in (student, teacher)]
    return to_mean(kd(*rows, temperature=temperature, scale=True, backend=backend), mask)


def relational_kd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    backend: Backend = "auto",
    group: Group = None,
) -> Tensor:
    """Return how far distances and angles between samples are apart in two networks, RKD (Park et al. 2019).

    The loss is ``distance_weight · mean_ij ℓ(d_ij / mean(d)) + angle_weight · mean_ijk ℓ(cos ∠ x_i x_j x_k)``, where ℓ
    is the smooth L1 distance between student and teacher. The mean of the distances is over positive distances. The
    cosine is 0 where x_i or x_k equals x_j, so equal samples give no gradient to each other.

    Args:
        student: b x d_S embeddings, float32, float64, bfloat16 or float16, any strides.
        teacher: b x d_T embeddings. They receive a gradient only if they require one.
        mask: b bools, True for each sample that counts. The result equals the result of the batch without the other
            samples, whatever these hold. None counts all samples.
        distance_weight: the weight of the distances. 0 leaves them out.
        angle_weight: the weight of the angles. 0 leaves them out.
        backend: "auto", "reference", "native", "triton" or "library"; see ``kdkernels.use_backend``.
        group: the process group that shares the batch, "world" for the default group, or None for one process.
            Every process gathers all embeddings and computes the whole loss.

    Returns:
        A scalar: float64 if an input is float64, otherwise float32.

    Raises:
        TypeError: if an argument has the wrong type. The message names the argument, what was expected and what it got.
        ValueError: if a shape or a setting does not fit, with the same parts in the message.
        RuntimeError: if the named backend cannot run here. The message says why.

    Memory:
        Five b x b matrices and b (2·d_S + d_T) numbers in float64, and the gradient before and after it is scaled. A
        teacher that learns takes one matrix more. No tensor of b³ or b x b x d exists.

    Examples:
        >>> import torch
        >>> from kdkernels import relational_kd_loss
        >>> student, teacher = torch.randn(32, 64, requires_grad=True), torch.randn(32, 128)
        >>> relational_kd_loss(student, teacher).backward()
        >>> student.grad.shape
        torch.Size([32, 64])
    """
    group = groups.resolve(group)
    if group is not None:
        from ..ops.rkd.distributed import rkd as over_ranks

        return over_ranks(student, teacher, distance_weight, angle_weight, mask, backend, group)
    weights = {"distance_weight": distance_weight, "angle_weight": angle_weight}
    return rkd(student, teacher, **weights, mask=mask, backend=backend)


def probabilistic_transfer_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    eps: float = 1e-8,
    backend: Backend = "auto",
    group: Group = None,
) -> Tensor:
    """Return the divergence of the sample affinities of two networks, PKT (Passalis and Tefas 2018).

    A cosine becomes the affinity ``(1 + cos) / 2``, and every row of affinities is divided by its sum. The loss is
    ``mean_ij p_ij log(p_ij / q_ij)``, where p belongs to the teacher and q to the student.

    Args:
        student: b x d_S embeddings, float32, float64, bfloat16 or float16, any strides.
        teacher: b x d_T embeddings. They receive a gradient only if they require one.
        mask: b bools, True for each sample that counts. The result equals the result of the batch without the other
            samples, whatever these hold. None counts all samples.
        eps: an embedding with a norm of at most eps has cosine 0 with every embedding, and its gradient is 0.
            Affinities of opposite samples are raised to eps.
        backend: "auto" or "reference", because this loss has no kernels.
        group: the process group that shares the batch, "world" for the default group, or None for one process.
            Every process gathers all embeddings and computes the whole loss.

    Returns:
        A scalar: float64 if an input is float64, otherwise float32.

    Raises:
        TypeError: if an argument has the wrong type. The message names the argument, what was expected and what it got.
        ValueError: if a shape or a setting does not fit, with the same parts in the message.
        RuntimeError: if ``backend`` is "native" or "triton".

    Memory:
        At most ten b x b matrices and b·max(4·d_S, 2·d_S + 2·d_T) numbers in float64. float32 keeps no digits of the
        loss of two networks that nearly agree.

    Examples:
        >>> import torch
        >>> from kdkernels import probabilistic_transfer_loss
        >>> student, teacher = torch.randn(32, 64, requires_grad=True), torch.randn(32, 128)
        >>> probabilistic_transfer_loss(student, teacher).backward()
        >>> student.grad.shape
        torch.Size([32, 64])
    """
    checks.embeddings(student, teacher)
    checks.sample_mask(mask, "student", student)
    eps = check_probabilistic_transfer(eps, backend)
    group = groups.resolve(group)
    PROBABILISTIC_TRANSFER.choose("reference", student)
    if group is not None:
        return _probabilistic_transfer_over_ranks(student, teacher, mask, eps, group)
    given = (student, teacher) if mask is None else zeroed(mask, (student, teacher))
    with torch.autocast(student.device.type, enabled=False):
        log_q, log_p = (_log_affinities(rows.double(), eps, mask) for rows in given)
        loss = F.kl_div(log_q, log_p, reduction="sum", log_target=True) / log_p.numel()
    return to_mean(loss, mask, power=2).to(accumulation_dtype(student, teacher))


def check_probabilistic_transfer(eps: float, backend: str) -> float:
    PROBABILISTIC_TRANSFER.check_backend(backend)
    return checks.non_negative("eps", eps)


def _probabilistic_transfer_over_ranks(
    student: Tensor, teacher: Tensor, mask: Tensor | None, eps: float, group: Group
) -> Tensor:
    x, y = (rows.to(accumulation_dtype(rows)) for rows in (student, teacher))
    widths = {"student's width": x.shape[1], "teacher's width": y.shape[1]}
    terms = {"eps": eps, "dtype": (x.dtype, y.dtype), "masked": mask is not None}
    ranks = distributed.agree(group, len(x), x.device, **widths, **terms)
    whole = functools.partial(probabilistic_transfer_loss, eps=eps)
    return distributed.loss_of_all_rows(ranks, whole, x, y, mask=mask)


def _log_affinities(rows: Tensor, eps: float, mask: Tensor | None) -> Tensor:
    """Return the logarithms of the affinities, divided by the sum of their row. Pairs that do not count have 0."""
    products = rows @ rows.T  # the products are scaled, and not the rows: unit rows would take two more copies of them
    squares = products.diagonal()
    alive = ~(squares <= eps * eps)
    inverse = torch.where(alive, torch.where(alive, squares, 1).rsqrt(), 0)
    cosines = products * inverse[:, None] * inverse
    affinities = ((1 + cosines) / 2).clamp(min=max(eps, torch.finfo(rows.dtype).tiny))
    if mask is None:
        return affinities.log() - affinities.sum(1, keepdim=True).log()
    out = ~pairs(mask)
    sums = affinities.masked_fill(out, 0).sum(1).masked_fill(~mask, 1)
    return (affinities.log() - sums.log()[:, None]).masked_fill(out, 0)
