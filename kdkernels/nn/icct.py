"""Inter-class correlation transfer (ICCT) as a module."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from .. import functional
from ..ops import icc
from ..types import Backend, Group, Reduction
from .base import SettingsModule

__all__ = ["InterClassCorrelationLoss"]


@dataclass(eq=False, repr=False)
class InterClassCorrelationLoss(SettingsModule):
    """Hold the settings of ``kdkernels.inter_class_correlation_loss`` (ICCT Eqs. 5-7).

    Call it with the b x K logits of student and teacher, and with the masks of samples and classes if there are any. It
    returns a scalar. Arguments, errors and memory: see the
    function.

    Examples:
        >>> import torch
        >>> from kdkernels.nn import InterClassCorrelationLoss
        >>> icct = InterClassCorrelationLoss()
        >>> icct(torch.randn(64, 100), torch.randn(64, 100)).shape
        torch.Size([])
    """

    _: KW_ONLY
    per_sample: bool = False
    reduction: Reduction = "mean"
    backend: Backend = "auto"
    group: Group = None

    def check(self) -> None:
        super().check()
        icc.check_settings(self.reduction)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        mask: Tensor | None = None,
        class_mask: Tensor | None = None,
    ) -> Tensor:
        return functional.inter_class_correlation_loss(
            student_logits, teacher_logits, mask=mask, class_mask=class_mask, **self.settings
        )
