"""Local correlation consistency (LKD) as a module, and its class-aware attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, InitVar, dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks, functional
from ..functional.lkd import sides
from ..ops import local_correlation
from ..types import Backend, FormName, Group, LocalReduction, Partition
from .base import SettingsModule

__all__ = ["ClassAwareAttention", "LocalCorrelationLoss"]


@dataclass(eq=False, repr=False)
class LocalCorrelationLoss(SettingsModule):
    """Hold the settings of ``kdkernels.local_correlation_loss`` (LKD Eqs. 4-7, 10).

    Call it with n x c x h x w features of student and teacher, or with sequences of them, one per stage. It returns a
    scalar. Arguments that are not listed here, errors and memory are those of the function.

    Args:
        threshold: as in the function. It needs ``attention``, because the loss crops by a mask.
        attention: a frozen ``ClassAwareAttention``, or a sequence of them, one per stage. It makes the masks from the
            teacher's features. Any module that does so works. Instead, a call can pass a mask and a threshold of its
            own as third and fourth argument.

    Examples:
        >>> import torch
        >>> from kdkernels.nn import ClassAwareAttention, LocalCorrelationLoss
        >>> attention = ClassAwareAttention(channels=64, num_classes=10).freeze()
        >>> lkd = LocalCorrelationLoss(k=4, threshold=0.1, attention=attention)
        >>> lkd(torch.randn(8, 16, 8, 8), torch.randn(8, 64, 8, 8)).shape
        torch.Size([])
    """

    k: int | Sequence[int]
    _: KW_ONLY
    weights: Sequence[float] = (1.0, 1.0, 1.0)
    threshold: float | None = None
    partition: Partition = "exact"
    reduction: LocalReduction = "batchmean"
    eps: float = 1e-8
    form: FormName = "auto"
    backend: Backend = "auto"
    group: Group = None
    attention: InitVar[nn.Module | Sequence[nn.Module] | None] = None

    def __post_init__(self, attention: nn.Module | Sequence[nn.Module] | None) -> None:
        if self.threshold is not None and attention is None:
            raise ValueError(
                f"threshold={self.threshold} needs a mask to crop by, got attention=None; pass attention=, "
                "or pass mask and threshold in the call"
            )
        super().__post_init__()
        self.k = sides(self.k)
        modules = [attention] if isinstance(attention, nn.Module) else attention
        self.attentions = None if modules is None else nn.ModuleList(modules)

    def check(self) -> None:
        super().check()
        settings = local_correlation.Settings(self.threshold, self.partition, self.eps, self.form)
        local_correlation.check_settings(self.k, self.weights, self.reduction, settings)

    def forward(
        self,
        student: Tensor | Sequence[Tensor],
        teacher: Tensor | Sequence[Tensor],
        mask: Tensor | Sequence[Tensor] | None = None,
        threshold: float | None = None,
    ) -> Tensor:
        settings = self.settings
        if threshold is not None:
            settings["threshold"] = threshold
        if mask is None and self.attentions is not None:
            mask = _masks(self.attentions, [teacher] if isinstance(teacher, Tensor) else teacher)
        return functional.local_correlation_loss(student, teacher, mask=mask, **settings)


def _masks(attentions: nn.ModuleList, teacher: Sequence[Tensor]) -> list[Tensor]:
    if len(teacher) != len(attentions):
        raise ValueError(f"teacher must have the {len(attentions)} stages of attention, got {len(teacher)}")
    with torch.no_grad():
        return [attention(stage) for attention, stage in zip(attentions, teacher, strict=True)]


@dataclass(eq=False, repr=False)
class ClassAwareAttention(SettingsModule):
    """Generate the class-aware mask of a teacher's features (LKD Eqs. 8-9).

    A mask generator makes the mask, and an auxiliary classifier trains the generator. Train both on the features of one
    stage of a frozen teacher: minimise ``loss(features, labels)``, then call ``freeze()``. From then on
    ``module(features)`` is the mask that ``local_correlation_loss`` takes.

    Args:
        channels: the channels of the teacher's features.
        num_classes: the classes of the auxiliary classifier.
        width: the channels of the hidden layers of the mask generator. None is half of ``channels``, at least 8.
        depth: the conv-bn-relu blocks of the mask generator.
        blocks: the bottleneck blocks of the auxiliary classifier.

    Raises:
        TypeError: if an argument has the wrong type. The message names the argument, what was expected and what it got.
        ValueError: if a number is out of range, with the same parts in the message.

    Examples:
        >>> import torch
        >>> from kdkernels.nn import ClassAwareAttention
        >>> attention, features = ClassAwareAttention(channels=64, num_classes=10), torch.randn(8, 64, 8, 8)
        >>> attention.loss(features, torch.randint(10, (8,))).backward()
        >>> attention.freeze()(features).shape
        torch.Size([8, 8, 8])
    """

    channels: int
    num_classes: int
    _: KW_ONLY
    width: int | None = None
    depth: int = 2
    blocks: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        channels = self.channels
        width = max(channels // 2, 8) if self.width is None else self.width
        widths = [channels] + [width] * self.depth
        self.generator = nn.Sequential(
            *(_conv_bn_relu(a, b, 3) for a, b in pairwise(widths)),
            nn.Conv2d(width, 1, 1),
            nn.Sigmoid(),
        )
        self.classifier = nn.Sequential(
            *(_Bottleneck(channels) for _ in range(self.blocks)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, self.num_classes),
        )

    def check(self) -> None:
        for name in ("channels", "num_classes", "depth"):
            checks.positive_int(name, getattr(self, name))
        checks.non_negative_int("blocks", self.blocks)
        if self.width is not None:
            checks.positive_int("width", self.width)

    def forward(self, features: Tensor) -> Tensor:
        """Return the mask, n x h x w in (0, 1), of n x c x h x w teacher features (Eq. 8)."""
        checks.tensor("features", features, 4, "n x c x h x w")
        if features.shape[1] != self.channels:
            raise ValueError(f"features must have {self.channels} channels, got {features.shape[1]}")
        mask: Tensor = self.generator(features)
        return mask[:, 0]

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy of the auxiliary classifier on the masked features ``M ⊗ f`` (Eq. 9)."""
        logits = self.logits(features)
        return F.cross_entropy(logits, checks.labels(labels, logits))

    def logits(self, features: Tensor) -> Tensor:
        """Return the n x num_classes logits of the auxiliary classifier on the masked features."""
        logits: Tensor = self.classifier(self(features)[:, None] * features)
        return logits

    def freeze(self) -> ClassAwareAttention:
        """Stop the training: no gradients, and fixed batch statistics even if a parent module calls ``train()``.

        Returns:
            The module itself.
        """
        self.requires_grad_(False)
        self.train(False)
        return self

    def train(self, mode: bool = True) -> ClassAwareAttention:
        """Switch to training mode, unless the module is frozen."""
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
