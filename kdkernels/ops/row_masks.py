"""Masks of rows: the samples of a batch that a loss counts. The other samples are padding, whatever they hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def zeroed(mask: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors with zeros in the rows that do not count. These rows have gradient 0, also if they hold NaN.

    A tensor that comes twice is copied once.
    """
    padding = ~mask
    copies: list[Tensor] = []
    for place, x in enumerate(tensors):
        earlier = [copy for copy, other in zip(copies, tensors[:place], strict=True) if other is x]
        copies += earlier[:1] or [x.masked_fill(padding.reshape(-1, *[1] * (x.dim() - 1)), 0)]
    return copies


def count(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the number of rows that count, and 1 if none does, because losses divide by it.

    The number stays on the device. A GPU is not waited for.
    """
    return mask.sum().clamp(min=1).to(dtype)


def to_mean(loss: Tensor, mask: Tensor | None, power: int = 1) -> Tensor:
    """Turn the mean of a loss over b^power terms into the mean over the n^power terms of the rows that count."""
    return loss if mask is None else loss * (mask.shape[0] / count(mask, loss.dtype)) ** power


def pairs(mask: Tensor) -> Tensor:
    """Return for each pair of rows whether both count, b x b."""
    return mask[:, None] & mask
