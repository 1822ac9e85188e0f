"""Losses that the methods are trained beside or compared with."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional

__all__ = ["KDLoss"]


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
