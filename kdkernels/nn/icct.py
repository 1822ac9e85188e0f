"""Inter-class correlation transfer (ICCT)."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional

__all__ = ["InterClassCorrelationLoss"]


class InterClassCorrelationLoss(nn.Module):
    """Divergence of inter-class correlation maps (ICCT Eqs. 5-7).

    See ``kdkernels.inter_class_correlation_loss`` for the settings.
    """

    def __init__(
        self,
        *,
        per_sample: bool = False,
        reduction: str = "mean",
        backend: str = "auto",
        group: object | None = None,
    ) -> None:
        super().__init__()
        self.per_sample = per_sample
        self.reduction = reduction
        self.backend = backend
        self.group = group

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return functional.inter_class_correlation_loss(
            student_logits,
            teacher_logits,
            per_sample=self.per_sample,
            reduction=self.reduction,
            backend=self.backend,
            group=self.group,
        )

    def extra_repr(self) -> str:
        return f"per_sample={self.per_sample}, reduction={self.reduction!r}"
