"""Temperature-softened KL divergence, in plain PyTorch: the specification of ``kd``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def kd(student: Tensor, teacher: Tensor, temperature: float, scale: float = 1.0) -> Tensor:
    """Batch mean of KL(softmax(teacher / T) ‖ softmax(student / T)) (LKD Eq. 1), times ``scale``."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    log_p = F.log_softmax(teacher.to(dtype) / temperature, dim=1)
    log_q = F.log_softmax(student.to(dtype) / temperature, dim=1)
    return scale * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
