"""Relations between tokens: the loss of Gram anchoring, token relation distillation, and attention relations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks, groups
from ..ops import token_relation as _token_relation
from ..ops.patches.reference import unit_rows
from ..ops.shapes import accumulation_dtype
from ..ops.token_relation.reference import EPS
from ..types import Across, Axis, Backend, Clip, Comparison, ContrastiveComparison, FormName, Group, Reduction

__all__ = ["contrastive_relation_loss", "token_relation_loss"]


def token_relation_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    comparison: Comparison = "mse",
    temperature: float | Sequence[float] = 1.0,
    margin: float = 0.0,
    clip: Clip | None = None,
    mask: Tensor | Sequence[Tensor] | None = None,
    heads: int = 1,
    across: Across = "image",
    axis: Axis = "tokens",
    normalize: bool = True,
    reduction: Reduction = "mean",
    form: FormName = "auto",
    backend: Backend = "auto",
    group: Group = None,
) -> Tensor:
    """Return how far the relations between tokens of two networks are apart.

    The relations of an image are ``S = X Xᵀ``, n x n: the dot products of its n tokens, divided by their norms. With
    ``S`` of the student and ``T`` of the teacher, a pair of tokens contributes:

    - "mse": ``(S_ij − T_ij)²``. This is DINOv3's Gram anchoring, and LKD's intra term with tokens for patches.
    - "hinge": ``relu(|S_ij − T_ij| − margin)``, as in VA-VAE and VideoREPA.

    A row contributes, with ``P_i = softmax(S_i / temperature)`` and ``Q_i = softmax(T_i / temperature)``:

    - "kl": ``KL(Q_i ‖ P_i)``, as in LightlyTrain.
    - "cross_entropy": ``−Σ_j Q_ij log P_ij``, as in OpenCLIP. The student's gradient is the gradient of "kl".

    Args:
        student: b x n x c tokens or b x c x h x w maps, whose pixels are the tokens. With ``across="batch"``, n x c is
            accepted too. A pair of tensors, queries and keys, gives the relations ``S = X_queries X_keysᵀ``. Both have
            the same number of channels, and may differ in the number of tokens. float32, float64, bfloat16 or float16,
            any strides.
        teacher: the teacher's tokens: as many as the student's, with any number of channels. A pair if the student is
            one. They receive a gradient only if they require one.
        comparison: "mse", "hinge", "kl" or "cross_entropy".
        temperature: divides the relations of "kl" and "cross_entropy". A pair is the student's and the teacher's.
        margin: differences up to ``margin`` cost nothing in "hinge".
        clip: "both" sets negative relations of both networks to 0. "teacher" sets the teacher's negative relations to
            0, and the student's negative relations of the same pairs. "teacher_only" leaves the student's as they are.
        mask: b x n bool, True for the tokens that count; b x h x w for maps. The result is the result of the images
            without the other tokens. With queries and keys, a mask for both or one for each.
        heads: the channels are cut into this number of equal heads, which have relations of their own.
        across: "image" relates the tokens of one image. "batch" relates the tokens of the whole batch, as if they were
            one image.
        axis: "tokens" relates tokens. "channels" relates channels, ``S = Xᵀ X``. Both networks then have the same
            number of channels. Without a mask, they may differ in the number of tokens.
        normalize: divide the rows of X by their norms. A row of norm 0 has relation 0 with every row, and gradient 0.
        reduction: "mean" divides the sum by the number of pairs ("mse", "hinge") or rows ("kl", "cross_entropy") of the
            whole batch that count. "sum" does not.
        form: "gram" works on tiles of the n x n matrices. "feature" works on c x c sums, for "mse" without ``clip``.
            "auto" takes the cheaper form.
        backend: "auto", "reference", "native", "triton" or "library"; see ``kdkernels.use_backend``.
        group: the process group that shares the batch, "world" for the default group, or None for one process. With
            ``across="batch"``, tokens move in a ring: a process holds at most two blocks of other processes.

    Returns:
        A scalar: float64 if an input is float64, otherwise float32. It is 0 if no token counts.

    Raises:
        TypeError: if an argument has the wrong type. The message names the argument, what was expected and what it got.
        ValueError: if a shape or a setting does not fit, with the same parts in the message.
        RuntimeError: if the named backend cannot run here. The message says why.

    Memory:
        2·b·n·c_S numbers, the gradient before and after it is scaled. One image at a time takes a packed matrix per
        network, n (c_S + c_T), and two strips of min(n, 256)·n numbers (Gram form) or a c x c sum (feature form). Up to
        1024 tokens, every thread works on an image of its own, and "kl" and "cross_entropy" hold its two n x n
        matrices, which would otherwise be computed twice. A teacher that learns takes 2·b·n·c_T more. On a GPU, the
        Gram form reads the tokens in place and takes five numbers per token besides the gradient. A mask takes a copy
        of the tokens in their dtype, and the feature form takes packed rows of the whole batch.

    Examples:
        >>> import torch
        >>> from kdkernels import token_relation_loss
        >>> student, teacher = torch.randn(8, 196, 192, requires_grad=True), torch.randn(8, 196, 768)
        >>> token_relation_loss(student, teacher, clip="both").backward()
        >>> student.grad.shape
        torch.Size([8, 196, 192])
    """
    settings = _token_relation.Settings(
        comparison, temperature, margin, clip, heads, across, axis, normalize, reduction, form
    )
    problem = _token_relation.check(student, teacher, mask, settings)
    group = groups.resolve(group)
    if group is not None:
        from ..ops.token_relation.distributed import token_relation_over_ranks

        return token_relation_over_ranks(problem, backend, group)
    return _token_relation.token_relation(problem, backend)


def contrastive_relation_loss(
    student_a: Tensor,
    student_b: Tensor,
    teacher_a: Tensor,
    teacher_b: Tensor,
    *,
    student_scale: Tensor | float = 1.0,
    teacher_scale: Tensor | float = 1.0,
    comparison: ContrastiveComparison = "kl",
    normalize: bool = True,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
    group: Group = None,
) -> Tensor:
    """Return how far two networks' similarities between two sets of embeddings are apart, as images and texts of CLIP.

    The logits are ``student_scale · A Bᵀ``, n x m, of the student, and the same of the teacher. The loss is the mean of
    two losses: the divergence of the softmaxes over the rows (from a to b), and over the columns (from b to a).
    OpenCLIP's ``DistillClipLoss`` takes the cross-entropy, CLIP-KD the divergence.

    Args:
        student_a: n x c embeddings, such as of images. float32, float64, bfloat16 or float16, any strides.
        student_b: m x c embeddings, such as of texts.
        teacher_a: n x c' embeddings of the teacher. They receive a gradient only if they require one.
        teacher_b: m x c' embeddings of the teacher.
        student_scale: the factor of the student's logits. A tensor with one number may learn: it receives its gradient.
        teacher_scale: the factor of the teacher's logits.
        comparison: "kl" or "cross_entropy".
        normalize: divide the embeddings by their norms.
        reduction: "mean" divides each of the two losses by its number of rows. "sum" does not.
        backend: "auto", "reference", "native", "triton" or "library"; see ``kdkernels.use_backend``.
        group: the process group that shares the batch, "world" for the default group, or None for one process. The
            embeddings move in a ring: a process holds at most two blocks of other processes.

    Returns:
        A scalar: float64 if an input is float64, otherwise float32.

    Raises:
        TypeError: if an argument has the wrong type. The message names the argument, what was expected and what it got.
        ValueError: if a shape or a setting does not fit, with the same parts in the message.
        RuntimeError: if the named backend cannot run here. The message says why.

    Memory:
        The packed embeddings of both networks, the gradients twice, and two strips of 2^20 logits. Scales in tensors
        take a few copies of the embeddings more. No n x m tensor exists.

    Examples:
        >>> import torch
        >>> from kdkernels import contrastive_relation_loss
        >>> images, texts = torch.randn(32, 64, requires_grad=True), torch.randn(32, 64, requires_grad=True)
        >>> scale = torch.tensor(10.0, requires_grad=True)
        >>> targets = torch.randn(32, 512), torch.randn(32, 512)
        >>> contrastive_relation_loss(images, texts, *targets, student_scale=scale, teacher_scale=100.0).backward()
        >>> scale.grad.shape
        torch.Size([])
    """
    _token_relation.check_contrastive(comparison)
    embeddings = {"student_a": student_a, "student_b": student_b, "teacher_a": teacher_a, "teacher_b": teacher_b}
    for name, value in embeddings.items():
        checks.tensor(name, value, 2, "n x c")
        checks.same_device(name, value, "student_a", student_a)
    for name, first, second in (("student_b", student_a, student_b), ("teacher_b", teacher_a, teacher_b)):
        if first.shape[1] != second.shape[1]:
            raise ValueError(f"{name} must have {first.shape[1]} channels, got {second.shape[1]}")
    for name, first, second in (("teacher_a", student_a, teacher_a), ("teacher_b", student_b, teacher_b)):
        if len(first) != len(second):
            raise ValueError(f"{name} must have {len(first)} rows, as the student has, got {len(second)}")
    scales = _scale("student_scale", student_scale), _scale("teacher_scale", teacher_scale)
    rows: Sequence[Tensor] = list(embeddings.values())
    temperatures = 1.0, 1.0
    if isinstance(scales[0], Tensor) or isinstance(scales[1], Tensor):
        # A scale that learns gets its gradient from PyTorch.
        dtype = accumulation_dtype(*rows)
        with torch.autocast(student_a.device.type, enabled=False):
            rows = [unit_rows(x.to(dtype), EPS) if normalize else x.to(dtype) for x in rows]
            rows = scales[0] * rows[0], rows[1], scales[1] * rows[2], rows[3]
        normalize = False
    else:
        temperatures = 1 / scales[0], 1 / scales[1]
    settings = _token_relation.Settings(
        comparison, temperatures, across="batch", normalize=normalize, reduction=reduction, both_directions=True
    )
    group = groups.resolve(group)
    if group is None:
        return _token_relation.token_relation(_token_relation.check(rows[:2], rows[2:], None, settings), backend)
    from ..ops.token_relation.distributed import token_relation_over_ranks

    directions = (rows[:2], rows[2:]), (rows[1::-1], rows[3:1:-1])
    losses = [
        token_relation_over_ranks(
            _token_relation.check(*pairs, None, settings._replace(both_directions=False)), backend, group
        )
        for pairs in directions
    ]
    return (losses[0] + losses[1]) / 2


def _scale(name: str, value: Tensor | float) -> Tensor | float:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must hold one number, got shape {tuple(value.shape)}")
        return value.reshape(())
    return checks.positive(name, value)
