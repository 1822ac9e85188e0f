"""Losses that the methods are trained beside or compared with."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .. import functional

__all__ = [
    "AttentionTransferLoss",
    "HintLoss",
    "KDLoss",
    "LogitMSELoss",
    "ProbabilisticTransferLoss",
    "RelationalKDLoss",
    "SimilarityPreservingLoss",
    "TeacherFreeKDLoss",
]


class KDLoss(nn.Module):
    """Temperature-softened KL divergence (LKD Eq. 1); see ``kdkernels.kd_loss`` for the settings."""

    def __init__(self, temperature: float = 4.0, *, scale: bool = True, backend: str = "auto") -> None:
        super().__init__()
        self.temperature = temperature
        self.scale = scale
        self.backend = backend

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return functional.kd_loss(
            student_logits, teacher_logits, temperature=self.temperature, scale=self.scale, backend=self.backend
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, scale={self.scale}"


class TeacherFreeKDLoss(nn.Module):
    """Self-training by an earlier copy of the student; see ``kdkernels.teacher_free_kd_loss`` for the settings."""

    def __init__(
        self, alpha: float = 0.9, temperature: float = 4.0, *, scale: bool = True, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.temperature = temperature
        self.scale = scale
        self.backend = backend

    def forward(self, student_logits: Tensor, own_logits: Tensor, labels: Tensor) -> Tensor:
        return functional.teacher_free_kd_loss(
            student_logits,
            own_logits,
            labels,
            alpha=self.alpha,
            temperature=self.temperature,
            scale=self.scale,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, temperature={self.temperature}, scale={self.scale}"


class LogitMSELoss(nn.Module):
    """Logit transfer; see ``kdkernels.logit_mse_loss``."""

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return functional.logit_mse_loss(student_logits, teacher_logits)


class AttentionTransferLoss(nn.Module):
    """Activation-based attention transfer; see ``kdkernels.attention_transfer_loss`` for the settings."""

    def __init__(self, *, reduction: str = "mean", eps: float = 1e-12) -> None:
        super().__init__()
        self.reduction = reduction
        self.eps = eps

    def forward(self, student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor]) -> Tensor:
        return functional.attention_transfer_loss(student, teacher, reduction=self.reduction, eps=self.eps)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, eps={self.eps}"


class SimilarityPreservingLoss(nn.Module):
    """Similarity-preserving distillation; see ``kdkernels.similarity_preserving_loss`` for the settings."""

    def __init__(
        self,
        *,
        reduction: str = "mean",
        form: str = "auto",
        backend: str = "auto",
        group: object | None = None,
    ) -> None:
        super().__init__()
        self.reduction = reduction
        self.form = form
        self.backend = backend
        self.group = group

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return functional.similarity_preserving_loss(
            student, teacher, reduction=self.reduction, form=self.form, backend=self.backend, group=self.group
        )

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"


class HintLoss(nn.Module):
    """FitNet's hint: the student's features, through a 1 x 1 convolution, against the teacher's.

    See ``kdkernels.hint_loss``. The convolution is trained with the student: give its parameters to the optimiser.
    """

    def __init__(self, student_channels: int, teacher_channels: int, *, backend: str = "auto") -> None:
        super().__init__()
        self.regressor = nn.Conv2d(student_channels, teacher_channels, kernel_size=1)
        self.backend = backend

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return functional.hint_loss(self.regressor(student), teacher, backend=self.backend)


class RelationalKDLoss(nn.Module):
    """Distances and angles between samples (RKD); see ``kdkernels.relational_kd_loss`` for the settings."""

    def __init__(
        self,
        *,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
        backend: str = "auto",
        group: object | None = None,
    ) -> None:
        super().__init__()
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight
        self.backend = backend
        self.group = group

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return functional.relational_kd_loss(
            student,
            teacher,
            distance_weight=self.distance_weight,
            angle_weight=self.angle_weight,
            backend=self.backend,
            group=self.group,
        )

    def extra_repr(self) -> str:
        return f"distance_weight={self.distance_weight}, angle_weight={self.angle_weight}"


class ProbabilisticTransferLoss(nn.Module):
    """Divergence of cosine affinities (PKT); see ``kdkernels.probabilistic_transfer_loss`` for the settings."""

    def __init__(self, *, eps: float = 1e-8, group: object | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.group = group

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return functional.probabilistic_transfer_loss(student, teacher, eps=self.eps, group=self.group)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"
