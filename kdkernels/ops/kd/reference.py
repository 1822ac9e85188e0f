"""Temperature-softened KL divergence, in plain PyTorch: the specification of ``kd``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..divergence import reference


def kd(student: Tensor, teacher: Tensor, temperature: float, scale: float = 1.0) -> Tensor:
    """Return ``scale`` times the batch mean of KL(softmax(teacher / T) ‖ softmax(student / T)) (LKD Eq. 1)."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    log_p = (teacher.to(dtype) / temperature).log_softmax(1)
    log_q = (student.to(dtype) / temperature).log_softmax(1)
    return scale * reference.kl(log_p, log_q).sum() / student.shape[0]
