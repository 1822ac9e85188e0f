"""The student's side of a top-k teacher in plain PyTorch: the specification of ``top_k``."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def with_others(exponents: Tensor, indices: Tensor) -> Tensor:
    """Return the exponents of the classes in ``indices``, and last the log-sum-exp of all other exponents.

    Args:
        exponents: ... x K logits, divided by the temperature.
        indices: ... x k classes.

    Returns:
        ... x (k + 1). If no other class is left, or all of them have -inf, the last number is -inf.
    """
    others = exponents.scatter(-1, indices, -math.inf)
    missing = (others == -math.inf).all(-1, keepdim=True)
    log_others = torch.where(missing, 0, others).logsumexp(-1, keepdim=True)
    return torch.cat([exponents.gather(-1, indices), torch.where(missing, -math.inf, log_others)], -1)
