"""Local correlation consistency (LKD) and its class-aware attention."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks, functional

__all__ = ["ClassAwareAttention", "LocalCorrelationLoss"]


class LocalCorrelationLoss(nn.Module):
    """Local correlation consistency (LKD Eqs. 4-7, 10); see ``kdkernels.local_correlation_loss`` for the settings."""

    def __init__(
        self,
        k: int | Sequence[int],
        *,
        weights: Sequence[float] = (1.0, 1.0, 1.0),
        threshold: float | None = None,
        partition: str = "exact",
        reduction: str = "sum",
        eps: float = 1e-8,
        form: str = "auto",
        backend: str = "auto",
        group: object | None = None,
    ) -> None:
        super().__init__()
        self.k = k
        self.weights = weights
        self.threshold = threshold
        self.partition = partition
        self.reduction = reduction
        self.eps = eps
        self.form = form
        self.backend = backend
        self.group = group

    def forward(
        self,
        student: Tensor | Sequence[Tensor],
        teacher: Tensor | Sequence[Tensor],
        mask: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor:
        return functional.local_correlation_loss(
            student,
            teacher,
            self.k,
            weights=self.weights,
            mask=mask,
            threshold=None if mask is None else self.threshold,
            partition=self.partition,
            reduction=self.reduction,
            eps=self.eps,
            form=self.form,
            backend=self.backend,
            group=self.group,
        )

    def extra_repr(self) -> str:
        return (
            f"k={self.k}, weights={self.weights}, threshold={self.threshold}, partition={self.partition!r}, "
            f"reduction={self.reduction!r}, eps={self.eps}"
        )


class ClassAwareAttention(nn.Module):
    """Class-aware attention (LKD Eqs. 8-9): a mask generator and the auxiliary classifier that trains it.

    Train it on a frozen teacher's features of one stage by minimising ``loss(features, labels)``, then call
    ``freeze()``; from then on ``module(features)`` is the mask that ``local_correlation_loss`` takes.

    Args:
        channels: channels of the teacher's features.
        num_classes: classes of the auxiliary classifier.
        width: channels of the mask generator's hidden layers; by default half of ``channels``, at least 8.
        depth: conv-bn-relu blocks of the mask generator.
        blocks: bottleneck blocks of the auxiliary classifier.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what it got.
    """

    def __init__(
        self, channels: int, num_classes: int, *, width: int | None = None, depth: int = 2, blocks: int = 2
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("num_classes", num_classes), ("depth", depth)):
            checks.positive_int(name, value)
        checks.non_negative_int("blocks", blocks)
        width = max(channels // 2, 8) if width is None else width
        checks.positive_int("width", width)
        self.channels = channels
        widths = [channels] + [width] * depth
        self.generator = nn.Sequential(
            *(_conv_bn_relu(a, b, 3) for a, b in pairwise(widths)),
            nn.Conv2d(width, 1, 1),
            nn.Sigmoid(),
        )
        self.classifier = nn.Sequential(
            *(_Bottleneck(channels) for _ in range(blocks)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, num_classes),
        )

    def forward(self, features: Tensor) -> Tensor:
        """The mask, n x h x w in (0, 1), of n x c x h x w teacher features (Eq. 8)."""
        checks.tensor("features", features, 4, "n x c x h x w")
        if features.shape[1] != self.channels:
            raise ValueError(f"features must have {self.channels} channels, got {features.shape[1]}")
        return self.generator(features)[:, 0]

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the auxiliary classifier on the masked features ``M ⊗ f`` (Eq. 9)."""
        return F.cross_entropy(self.logits(features), labels)

    def logits(self, features: Tensor) -> Tensor:
        """What the auxiliary classifier makes of the masked features, n x num_classes."""
        return self.classifier(self(features)[:, None] * features)

    def freeze(self) -> ClassAwareAttention:
        """Stop training for good: no gradients, and batch statistics fixed whatever ``train()`` the parent calls."""
        self.requires_grad_(False)
        self.train(False)
        return self

    def train(self, mode: bool = True) -> ClassAwareAttention:
        trainable = any(parameter.requires_grad for parameter in self.parameters())
        return super().train(mode and trainable)


def _conv_bn_relu(inputs: int, outputs: int, size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class _Bottleneck(nn.Module):
    """The residual bottleneck of ResNet: 1x1 to a quarter of the channels, 3x3, 1x1 back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(channels // 4, 4)
        self.body = nn.Sequential(
            _conv_bn_relu(channels, inner, 1),
            _conv_bn_relu(inner, inner, 3),
            nn.Conv2d(inner, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, features: Tensor) -> Tensor:
        return torch.relu(features + self.body(features))
