"""Metrics: how similar the representations of two networks are, and how much a method improves on another."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks
from .ops.congruence.plan import known
from .ops.row_masks import to_mean, zeroed
from .ops.shapes import accumulation_dtype
from .types import FORMS, FormName

__all__ = ["average_relative_improvement", "linear_cka", "semantic_mismatch_score"]


def linear_cka(x: Tensor, y: Tensor, *, mask: Tensor | None = None, form: FormName = "auto") -> Tensor:
    """Return the linear centred kernel alignment of two layers (Kornblith et al. 2019).

    The columns are centred over the samples. Then ``CKA = ‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖)``. It is 1 for features that are equal
    up to rotation and scale. It is the biased estimate: the sums include the diagonal.

    Args:
        x: n x ..., n >= 2. Each sample is flattened. float32, float64, bfloat16 or float16, any strides.
        y: n x ... features of the same samples, of any other width.
        mask: n bools, True for each sample that counts. The result is the CKA of the batch without the other samples,
            whatever these hold. None counts all samples.
        form: "feature" uses the d x d products above. "gram" uses the equal ``⟨XXᵀ, YYᵀ⟩ / (‖XXᵀ‖ ‖YYᵀ‖)`` of n x n
            products. "auto" takes the form with fewer multiply-adds.

    Returns:
        A scalar in [0, 1], float64 if an input is float64, otherwise float32. It is NaN if a network gives all samples
        the same features. It is 0 if no sample counts.

    Raises:
        TypeError: if an argument has the wrong type. The message names the argument, what was expected and what it got.
        ValueError: if a shape or a setting does not fit, with the same parts in the message.

    Memory:
        Both features, centred, in float32, and the products of the form.

    Examples:
        >>> import torch
        >>> from kdkernels import linear_cka
        >>> features = torch.randn(32, 16)
        >>> torch.allclose(linear_cka(features, 3 * features), torch.ones(()))
        True
    """
    checks.one_of("form", form, FORMS)
    checks.tensor("x", x, None, "n x ...")
    checks.tensor("y", y, None, "n x ...")
    checks.same_batch("y", y, "x", x)
    checks.same_device("y", y, "x", x)
    checks.sample_mask(mask, "x", x)
    if x.shape[0] < 2:
        raise ValueError(f"x must have at least 2 samples, got shape {tuple(x.shape)}")
    dtype = accumulation_dtype(x, y)
    with torch.autocast(x.device.type, enabled=False):
        a, b = (_centred(features.flatten(1).to(dtype), mask) for features in (x, y))
        empty = 0 if mask is None else (~mask.any()).double()  # in the divisor, so that no sample gives 0 and not NaN
        cheaper = _feature_form_is_cheaper(len(a), a.shape[1], b.shape[1])
        feature = cheaper if form == "auto" else form == "feature"
        if feature:
            cross, own_a, own_b = ((p.T @ q).double().norm() for p, q in ((a, b), (a, a), (b, b)))
            alignment: Tensor = cross.square() / (own_a * own_b + empty)
        else:
            gram_a, gram_b = ((rows @ rows.T).double() for rows in (a, b))
            alignment = (gram_a * gram_b).sum() / (gram_a.norm() * gram_b.norm() + empty)
        return alignment.to(dtype)


def _centred(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Return the rows less their mean, at a size whose products neither overflow nor vanish. Rows that do not count
    are 0.
    """
    if mask is None:
        rows = rows - rows.mean(0)
    else:
        (rows,) = zeroed(mask, (rows,))
        (rows,) = zeroed(mask, (rows - to_mean(rows.mean(0), mask),))
    largest = rows.detach().abs().amax()
    return rows / torch.where(largest > 0, largest, 1.0)


def _feature_form_is_cheaper(n: int, width_x: int, width_y: int) -> bool:
    n, width_x, width_y = map(known, (n, width_x, width_y))
    return width_x * width_y + width_x**2 + width_y**2 < n * (width_x + width_y)


def semantic_mismatch_score(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor | None = None,
    *,
    pairs: Sequence[tuple[int, int]] | None = None,
) -> Tensor:
    """Return the SM-score: how far the similarity matrices of associated layers are apart (SemCKD Eq. 18).

    ``(1/|C|) Σ_(i,j)∈C α_ij · MSE(student[i], teacher[j])``. If α differs between samples, it weights the row of its
    sample.

    Args:
        student: s_L x b x b matrices of the student's layers, as ``similarity_matrices`` returns them.
        teacher: t_L x b x b matrices of the teacher's layers.
        weights: α, b x s_L x t_L, or s_L x t_L for all samples. None is 1, for methods without attention.
        pairs: C, the associated (student layer, teacher layer) pairs. None is all pairs.

    Returns:
        A scalar: float64 if an input is float64, otherwise float32.

    Raises:
        TypeError: if an argument has the wrong type. The message names the argument, what was expected and what it got.
        ValueError: if a shape or a setting does not fit, with the same parts in the message.

    Memory:
        |C| x b x b numbers for the differences.

    Examples:
        >>> import torch
        >>> from kdkernels import semantic_mismatch_score
        >>> student, teacher = torch.zeros(2, 8, 8), torch.ones(3, 8, 8)
        >>> semantic_mismatch_score(student, teacher, pairs=[(0, 0), (1, 2)])
        tensor(1.)
    """
    checks.tensor("student", student, 3, "s_L x b x b")
    checks.tensor("teacher", teacher, 3, "t_L x b x b")
    checks.same_device("teacher", teacher, "student", student)
    layers, batch = (student.shape[0], teacher.shape[0]), student.shape[1]
    for name, matrices in (("student", student), ("teacher", teacher)):
        if matrices.shape[1:] != (batch, batch):
            raise ValueError(f"{name} must hold {batch} x {batch} matrices, got shape {tuple(matrices.shape)}")
    left, right = _indices(pairs, layers, student.device)
    dtype = accumulation_dtype(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        errors = (student.to(dtype)[left] - teacher.to(dtype)[right]).square().mean(2)  # |C| x b
        if weights is not None:
            errors = errors * _weights_of_samples(weights, batch, layers).to(dtype)[:, left, right].T
        return errors.mean()


def _indices(
    pairs: Sequence[tuple[int, int]] | None, layers: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    if pairs is None:
        pairs = [(i, j) for i in range(layers[0]) for j in range(layers[1])]
    try:
        found = [(operator.index(i), operator.index(j)) for i, j in pairs]
    except (TypeError, ValueError):
        found = []
    if not found or not all(0 <= i < layers[0] and 0 <= j < layers[1] for i, j in found):
        raise ValueError(f"pairs must be pairs of layers below {layers}, at least one, got {pairs!r}")
    left, right = torch.tensor(found, dtype=torch.int64, device=device).T
    return left, right


def _weights_of_samples(weights: Tensor, batch: int, layers: tuple[int, int]) -> Tensor:
    checks.tensor("weights", weights, None, "b x s_L x t_L")
    if weights.shape not in ((batch, *layers), layers):
        raise ValueError(
            f"weights must have shape {(batch, *layers)} or {layers}, got {tuple(weights.shape)}",
        )
    return weights.expand(batch, *layers)


def average_relative_improvement(
    accuracies: Sequence[float], compared: Sequence[float], student: Sequence[float]
) -> float:
    """Return ARI: how much more a method improves students than another method does, in percent (SemCKD Eq. 17).

    ``(1/M) Σ_i (accuracies[i] − compared[i]) / (compared[i] − student[i]) · 100``.

    Args:
        accuracies: the accuracies of the method, for M combinations of teacher and student.
        compared: the accuracies of the other method, for the same combinations.
        student: the accuracies of the student without a teacher, for the same combinations.

    Returns:
        Percent. It is infinite or NaN if the other method does not differ from the student.

    Raises:
        ValueError: if the three do not have the same length of at least 1.

    Examples:
        >>> from kdkernels import average_relative_improvement
        >>> average_relative_improvement([74.0, 76.0], [72.0, 74.0], [70.0, 70.0])
        75.0
    """
    given = (accuracies, compared, student)
    ours, theirs, alone = (torch.as_tensor(values, dtype=torch.float64, device="cpu") for values in given)
    shapes = [tuple(values.shape) for values in (ours, theirs, alone)]
    if shapes != 3 * [(ours.numel(),)] or not ours.numel():
        raise ValueError(f"accuracies, compared and student must have one length of at least 1, got shapes {shapes}")
    return 100 * ((ours - theirs) / (theirs - alone)).mean().item()
