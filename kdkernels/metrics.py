"""How alike two networks' representations are, and how much one method improves on others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks
from .native import accumulation_dtype
from .ops.congruence.plan import known

__all__ = ["average_relative_improvement", "linear_cka", "semantic_mismatch_score"]


def linear_cka(x: Tensor, y: Tensor, *, form: str = "auto") -> Tensor:
    """Linear centred kernel alignment of two layers' features for the same samples (Kornblith et al. 2019).

    With columns centred over the samples, ``CKA = ‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖)``: 1 for features equal up to rotation and
    scale. It is the biased estimate, with sums over all pairs of samples, the diagonal included.

    Args:
        x: n x ..., n >= 2; everything but the samples is flattened. float32, float64, bfloat16 or float16.
        y: n x ..., of any other width.
        form: "feature" uses d x d products as above, "gram" the equal ``⟨XXᵀ, YYᵀ⟩ / (‖XXᵀ‖ ‖YYᵀ‖)`` of n x n
            products; "auto" takes the one with fewer multiply-adds.

    Returns:
        A scalar in [0, 1]: float64 if either input is, else float32. NaN where one network gives all samples the same
        features, since nothing can be said of it.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what it got.

    Memory: both features centred in float32, and the products of the form taken.
    """
    checks.one_of("form", form, ("auto", "feature", "gram"))
    checks.tensor("x", x, None, "n x ...")
    checks.tensor("y", y, None, "n x ...")
    checks.same_batch("y", y, "x", x)
    checks.same_device("y", y, "x", x)
    if x.shape[0] < 2:
        raise ValueError(f"x must have at least 2 samples, got shape {tuple(x.shape)}")
    dtype = accumulation_dtype(x, y)
    with torch.autocast(x.device.type, enabled=False):
        a, b = (_centred(features.flatten(1).to(dtype)) for features in (x, y))
        feature = _feature_form_is_cheaper(*a.shape, b.shape[1]) if form == "auto" else form == "feature"
        if feature:
            cross, own_a, own_b = ((p.T @ q).double().norm() for p, q in ((a, b), (a, a), (b, b)))
            return (cross.square() / (own_a * own_b)).to(dtype)
        gram_a, gram_b = ((rows @ rows.T).double() for rows in (a, b))
        return ((gram_a * gram_b).sum() / (gram_a.norm() * gram_b.norm())).to(dtype)


def _centred(rows: Tensor) -> Tensor:
    """The rows less their mean, at a size whose products neither overflow nor vanish."""
    rows = rows - rows.mean(0)
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
    """SM-score: how far the similarity matrices of associated layers are apart (SemCKD Eq. 18).

    ``(1/|C|) Σ_(i,j)∈C α_ij · MSE(student[i], teacher[j])``. With one α per sample, each weights the row of its sample.

    Args:
        student: s_L x b x b matrices of the student's layers, as ``similarity_matrices`` returns them.
        teacher: t_L x b x b matrices of the teacher's layers.
        weights: α, b x s_L x t_L (or s_L x t_L for all samples); None is 1, as for methods without an attention.
        pairs: C, the associated (student layer, teacher layer); None is all of them.

    Returns:
        A scalar: float64 if either input is, else float32.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what it got.

    Memory: |C| x b x b for the differences.
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
    valid = all(
        isinstance(pair, Sequence) and len(pair) == 2 and 0 <= pair[0] < layers[0] and 0 <= pair[1] < layers[1]
        for pair in pairs
    )
    if not (pairs and valid):
        raise ValueError(f"pairs must be pairs of layers below {layers}, at least one, got {pairs!r}")
    left, right = torch.tensor(list(pairs), device=device).T
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
    """ARI: how much further a method takes students than another one did, in percent (SemCKD Eq. 17).

    ``(1/M) Σ_i (accuracies[i] − compared[i]) / (compared[i] − student[i]) · 100``.

    Args:
        accuracies: of the method, in M combinations of teacher and student.
        compared: of the method it is compared with, in the same combinations.
        student: of the student trained without a teacher.

    Returns:
        Percent. Infinite or NaN where the compared method does not differ from the student.

    Raises:
        ValueError: if the three do not have one length of at least 1.
    """
    ours, theirs, alone = (torch.as_tensor(values, dtype=torch.float64) for values in (accuracies, compared, student))
    shapes = [tuple(values.shape) for values in (ours, theirs, alone)]
    if shapes != 3 * [(ours.numel(),)] or not ours.numel():
        raise ValueError(f"accuracies, compared and student must have one length of at least 1, got shapes {shapes}")
    return 100 * ((ours - theirs) / (theirs - alone)).mean().item()
