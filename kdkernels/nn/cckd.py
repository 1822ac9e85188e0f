"""Correlation congruence (CCKD) as a module."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from .. import functional
from ..ops import correlation_congruence
from ..ops.correlation_congruence.reference import Kernel
from ..types import Backend, FormName, Group, KernelName, Reduction
from .base import SettingsModule

__all__ = ["CorrelationCongruenceLoss"]


@dataclass(eq=False, repr=False)
class CorrelationCongruenceLoss(SettingsModule):
    """Hold the settings of ``kdkernels.correlation_congruence_loss`` (CCKD Eq. 6).

    Call it with n x d_S student embeddings and n x d_T teacher embeddings, and a mask of the samples that count if some
    do not. It returns a scalar. Arguments, errors and
    memory: see the function.

    Examples:
        >>> import torch
        >>> from kdkernels.nn import CorrelationCongruenceLoss
        >>> cckd = CorrelationCongruenceLoss(kernel="taylor_rbf", gamma=0.4, order=2)
        >>> cckd(torch.randn(64, 128), torch.randn(64, 256)).shape
        torch.Size([])
    """

    _: KW_ONLY
    kernel: KernelName = "taylor_rbf"
    gamma: float = 0.4
    order: int = 2
    normalize: bool = True
    reduction: Reduction = "mean"
    form: FormName = "auto"
    backend: Backend = "auto"
    group: Group = None

    def check(self) -> None:
        super().check()
        kernel = Kernel(self.kernel, self.gamma, self.order)
        correlation_congruence.check_settings(kernel, self.reduction, self.form)

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        return functional.correlation_congruence_loss(student, teacher, mask=mask, **self.settings)
