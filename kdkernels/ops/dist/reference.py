"""DIST's correlations of probabilities in plain PyTorch: the specification of ``dist``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPS = 1e-8  # is added to the product of two norms, as in the authors' program


def dist(
    student: Tensor, teacher: Tensor, mask: Tensor | None, beta: float, gamma: float, temperature: float
) -> Tensor:
    """Return T² times the sum of beta (1 - mean correlation of rows) and gamma (1 - mean correlation of columns)
    (DIST Eqs. 7-9).

    A class with -inf in both networks is not in its row. A row counts unless the mask is False. The correlation of a row
    without classes is 0.
    """
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    s, t = student.to(dtype), teacher.to(dtype)
    rows = torch.ones_like(s[:, 0], dtype=torch.bool) if mask is None else mask
    there = ((s != -math.inf) | (t != -math.inf)) & rows[:, None]
    q, p = (torch.softmax(z.masked_fill(~there.any(1, keepdim=True), 0) / temperature, 1) for z in (s, t))
    inter, intra = _difference(q, p, there, rows, 1), _difference(q, p, there, there.any(0), 0)
    return temperature**2 * (beta * inter + gamma * intra)


def _difference(q: Tensor, p: Tensor, there: Tensor, lines: Tensor, dim: int) -> Tensor:
    """Return 1 - the mean of Pearson's correlation along ``dim``, over the ``lines`` that count."""
    counts = there.sum(dim)
    q, p = (_centred(x, there, counts, dim) for x in (q, p))
    norms: Tensor = torch.linalg.vector_norm(q, dim=dim) * torch.linalg.vector_norm(p, dim=dim)
    correlations = (q * p).sum(dim) / (norms + EPS)
    difference: Tensor = (1 - correlations).masked_fill(~lines, 0).sum() / lines.sum().clamp(min=1)
    return difference


def _centred(x: Tensor, there: Tensor, counts: Tensor, dim: int) -> Tensor:
    mean = x.masked_fill(~there, 0).sum(dim) / counts.clamp(min=1)
    return (x - mean.unsqueeze(dim)).masked_fill(~there, 0)
