"""The losses of the papers' other tasks: ArcFace for faces, triplets for persons, L2 mimic, and CCKD's Eq. 8.

Losses that compare the samples of a batch compare the samples of all processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import parallel


class CosineClassifier(nn.Module):
    """Return ``scale`` times the cosines between embeddings, b x d, and one learned direction per class."""

    def __init__(self, features: int, classes: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(classes, features)))

    @property
    def out_features(self) -> int:
        return len(self.weight)

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(embeddings), F.normalize(self.weight))


def arcface_loss(logits: Tensor, labels: Tensor, scale: float, margin: float) -> Tensor:
    """Return ArcFace (Deng et al. 2019, Eq. 3): the cross-entropy of ``s cos(θ + m)`` for the label's class and
    ``s cos θ`` for the others.

    Beyond θ = π − m the cosine would rise again. There, it is replaced by ``cos θ − m sin m``, as in the authors'
    program.

    Args:
        logits: b x K, of a ``CosineClassifier`` with this scale.
        margin: m, in radians.
    """
    cosines = logits.float() / scale
    own = cosines.gather(1, labels[:, None])
    sines = (1 - own.square()).clamp(min=1e-6).sqrt()  # the gradient of a root at 0 is infinite
    turned = own * math.cos(margin) - sines * math.sin(margin)
    turned = torch.where(own > -math.cos(margin), turned, own - margin * math.sin(margin))
    return F.cross_entropy(scale * cosines.scatter(1, labels[:, None], turned), labels)


def triplet_loss(embeddings: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Return the batch-hard triplet loss (Hermans et al. 2017, Eq. 5): the mean over all samples of ``relu(margin + p −
    n)``, where p is the distance to the farthest sample of the class, and n to the nearest sample of another class.

    A sample that has no other sample of its class, or of another class, is no anchor.
    """

    def whole(rows: Tensor, classes: Tensor) -> Tensor:
        rows = rows.float()
        squares = rows.square().sum(1)
        squared = squares[:, None] + squares - 2 * rows @ rows.T
        distances = squared.clamp(min=1e-12).sqrt()  # the gradient of a root at 0 is infinite
        same = classes == classes.T
        positive = same & ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        farthest = distances.masked_fill(~positive, 0).amax(1)
        nearest = distances.masked_fill(same, torch.inf).amin(1)
        anchors = positive.any(1) & ~same.all(1)
        losses = (margin + farthest - nearest).relu().masked_fill(~anchors, 0)
        return losses.sum() / anchors.sum().clamp(min=1)

    return parallel.over_all(whole, embeddings, labels[:, None])


def mimic_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over the batch of the squared distance between b x d embeddings (CCKD Eq. 2)."""
    return (student - teacher).square().sum(1).mean()


def polynomial_congruence(
    student: Tensor, teacher: Tensor, coefficients: Sequence[float], *, normalize: bool, reduction: str
) -> Tensor:
    """Return CCKD's congruence (Eq. 6) with the kernel of Eq. 8, ``Σ_p α_p (x · y)^p``, for any coefficients α.

    With Taylor's coefficients, ``kdkernels.correlation_congruence_loss`` returns the same and needs less memory: this
    one holds b x b matrices.

    Args:
        student, teacher: b x d embeddings.
        coefficients: α_0, α_1, ...
        normalize: whether embeddings are divided by their norm.
        reduction: "mean" divides by b², "sum" does not.
    """

    def kernel(rows: Tensor) -> Tensor:
        rows = F.normalize(rows.float()) if normalize else rows.float()
        products = rows @ rows.T
        value = torch.zeros_like(products)
        for coefficient in reversed(coefficients):  # Horner's rule
            value = value * products + coefficient
        return value

    def whole(own: Tensor, theirs: Tensor) -> Tensor:
        squares = (kernel(own) - kernel(theirs)).square()
        return squares.mean() if reduction == "mean" else squares.sum()

    if not coefficients:
        raise ValueError("coefficients must hold one number or more, got none")
    return parallel.over_all(whole, student, teacher)
