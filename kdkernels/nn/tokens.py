"""Relations between tokens as a module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from .. import functional
from ..ops import token_relation
from ..types import Across, Axis, Backend, Clip, Comparison, ContrastiveComparison, FormName, Group, Reduction
from .base import SettingsModule

__all__ = ["ContrastiveRelationLoss", "TokenRelationLoss"]


@dataclass(eq=False, repr=False)
class TokenRelationLoss(SettingsModule):
    """Hold the settings of ``kdkernels.token_relation_loss``.

    Call it with b x n x c tokens or b x c x h x w maps of student and teacher, or with a pair of queries and keys for
    each, and with a mask if some tokens do not count. It returns a scalar. Arguments, errors and memory: see the
    function.

    Examples:
        >>> import torch
        >>> from kdkernels.nn import TokenRelationLoss
        >>> loss = TokenRelationLoss(comparison="kl", temperature=0.07)
        >>> loss(torch.randn(8, 196, 192), torch.randn(8, 196, 768)).shape
        torch.Size([])
    """

    _: KW_ONLY
    comparison: Comparison = "mse"
    temperature: float | Sequence[float] = 1.0
    margin: float = 0.0
    clip: Clip | None = None
    heads: int = 1
    across: Across = "image"
    axis: Axis = "tokens"
    normalize: bool = True
    reduction: Reduction = "mean"
    form: FormName = "auto"
    backend: Backend = "auto"
    group: Group = None

    def check(self) -> None:
        super().check()
        own = {name: value for name, value in self.settings.items() if name not in ("backend", "group")}
        token_relation.check_settings(token_relation.Settings(**own))

    def forward(
        self,
        student: Tensor | Sequence[Tensor],
        teacher: Tensor | Sequence[Tensor],
        mask: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor:
        return functional.token_relation_loss(student, teacher, mask=mask, **self.settings)


@dataclass(eq=False, repr=False)
class ContrastiveRelationLoss(SettingsModule):
    """Hold the settings of ``kdkernels.contrastive_relation_loss``.

    Call it with n x c and m x c embeddings of the student, the same of the teacher, and the two scales of the logits.
    It returns a scalar. Arguments, errors and memory: see the function.

    Examples:
        >>> import torch
        >>> from kdkernels.nn import ContrastiveRelationLoss
        >>> images, texts = torch.randn(32, 64), torch.randn(32, 64)
        >>> ContrastiveRelationLoss()(images, texts, images, texts, student_scale=10.0, teacher_scale=10.0)
        tensor(0.)
    """

    _: KW_ONLY
    comparison: ContrastiveComparison = "kl"
    normalize: bool = True
    reduction: Reduction = "mean"
    backend: Backend = "auto"
    group: Group = None

    def check(self) -> None:
        super().check()
        token_relation.check_contrastive(self.comparison)
        token_relation.check_settings(token_relation.Settings(self.comparison, reduction=self.reduction))

    def forward(
        self,
        student_a: Tensor,
        student_b: Tensor,
        teacher_a: Tensor,
        teacher_b: Tensor,
        student_scale: Tensor | float = 1.0,
        teacher_scale: Tensor | float = 1.0,
    ) -> Tensor:
        return functional.contrastive_relation_loss(
            student_a,
            student_b,
            teacher_a,
            teacher_b,
            student_scale=student_scale,
            teacher_scale=teacher_scale,
            **self.settings,
        )
