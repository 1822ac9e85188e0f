"""Losses of logits that most papers compare with, as modules."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from .. import functional
from ..ops import dist, dkd
from ..types import Backend, Group, LabelReduction
from .base import SettingsModule

__all__ = ["DISTLoss", "DKDLoss"]


@dataclass(eq=False, repr=False)
class DKDLoss(SettingsModule):
    """Hold the settings of ``kdkernels.dkd_loss``, decoupled distillation.

    Call it with the ... x K logits of student and teacher, their labels, and a mask if some rows do not count. It
    returns a scalar, or the loss of each row for ``reduction="none"``.

    Examples:
        >>> import torch
        >>> from kdkernels.nn import DKDLoss
        >>> loss = DKDLoss(alpha=1.0, beta=8.0)
        >>> loss(torch.randn(64, 100), torch.randn(64, 100), torch.randint(100, (64,))).shape
        torch.Size([])
    """

    alpha: float = 1.0
    beta: float = 8.0
    temperature: float = 4.0
    _: KW_ONLY
    reduction: LabelReduction = "mean"
    ignore_index: int = -100
    backend: Backend = "auto"

    def check(self) -> None:
        super().check()
        dkd.check_settings(self.alpha, self.beta, self.temperature, self.reduction, self.ignore_index)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        return functional.dkd_loss(student_logits, teacher_logits, labels, mask=mask, **self.settings)


@dataclass(eq=False, repr=False)
class DISTLoss(SettingsModule):
    """Hold the settings of ``kdkernels.dist_loss``, DIST.

    Call it with the ... x K logits of student and teacher, and a mask if some rows do not count. It returns a scalar.

    Examples:
        >>> import torch
        >>> from kdkernels.nn import DISTLoss
        >>> DISTLoss(beta=1.0, gamma=1.0)(torch.randn(64, 100), torch.randn(64, 100)).shape
        torch.Size([])
    """

    beta: float = 1.0
    gamma: float = 1.0
    temperature: float = 1.0
    _: KW_ONLY
    backend: Backend = "auto"
    group: Group = None

    def check(self) -> None:
        super().check()
        dist.check_settings(self.beta, self.gamma, self.temperature)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None) -> Tensor:
        return functional.dist_loss(student_logits, teacher_logits, mask=mask, **self.settings)
