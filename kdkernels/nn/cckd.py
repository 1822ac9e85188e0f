"""Correlation congruence (CCKD)."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional

__all__ = ["CorrelationCongruenceLoss"]


class CorrelationCongruenceLoss(nn.Module):
    """Correlation congruence (CCKD Eq. 6); see ``kdkernels.correlation_congruence_loss`` for the settings."""

    def __init__(
        self,
        *,
        kernel: str = "taylor_rbf",
        gamma: float = 0.4,
        order: int = 2,
        normalize: bool = True,
        reduction: str = "mean",
        form: str = "auto",
        backend: str = "auto",
        group: object | None = None,
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.gamma = gamma
        self.order = order
        self.normalize = normalize
        self.reduction = reduction
        self.form = form
        self.backend = backend
        self.group = group

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return functional.correlation_congruence_loss(
            student,
            teacher,
            kernel=self.kernel,
            gamma=self.gamma,
            order=self.order,
            normalize=self.normalize,
            reduction=self.reduction,
            form=self.form,
            backend=self.backend,
            group=self.group,
        )

    def extra_repr(self) -> str:
        return (
            f"kernel={self.kernel!r}, gamma={self.gamma}, order={self.order}, normalize={self.normalize}, "
            f"reduction={self.reduction!r}"
        )
