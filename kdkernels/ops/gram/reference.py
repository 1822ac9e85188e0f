"""Similarity matrices in plain PyTorch: the specification of ``gram``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..shapes import accumulation_dtype


def gram(features: Sequence[Tensor]) -> Tensor:
    """A_l = R(F_l) R(F_l)ᵀ of every layer (SemCKD Eq. 8), L x b x b."""
    dtype = accumulation_dtype(*features)
    rows = [layer.flatten(1).to(dtype) for layer in features]
    return torch.stack([row @ row.T for row in rows])
