"""Decoupled knowledge distillation in plain PyTorch: the specification of ``dkd``."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def dkd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
    reduction: int,
    ignore_index: int,
) -> Tensor:
    """Return T² (alpha·TCKD + beta·NCKD), of each row, or its mean or sum over the rows that count (DKD Eq. 7).

    ``reduction`` is 0 for the mean, 1 for the sum, and 2 for one loss per row. A row counts unless its label is
    ``ignore_index``. The loss of other rows is 0. A row with another label that is no class gives NaN.
    """
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    classes = student.shape[1]
    counts = labels != ignore_index
    known = (labels >= 0) & (labels < classes)
    is_label = torch.arange(classes, device=labels.device) == labels[:, None]
    s, t = (z.to(dtype).masked_fill(~counts[:, None], 0) / temperature for z in (student, teacher))

    there = (s != -math.inf) | (t != -math.inf)
    # Without the label or without another class, there is nothing to decide between.
    undecided = ~(there & is_label).any(1) | ~(there & ~is_label).any(1)
    (q_margin, log_q), (p_margin, log_p) = _parts(s, is_label), _parts(t, is_label)
    q_margin, p_margin = (margin.masked_fill(undecided, 0) for margin in (q_margin, p_margin))
    of_label = _divergence(F.logsigmoid(p_margin), F.logsigmoid(q_margin))
    of_others = _divergence(F.logsigmoid(-p_margin), F.logsigmoid(-q_margin))
    rows = alpha * (of_label + of_others) + beta * _divergence(log_p, log_q).sum(1)
    rows = rows.masked_fill(~known, math.nan).masked_fill(~counts, 0)
    if reduction == 2:
        return temperature**2 * rows
    return temperature**2 * rows.sum() / (counts.sum().clamp(min=1) if reduction == 0 else 1)


def _parts(z: Tensor, is_label: Tensor) -> tuple[Tensor, Tensor]:
    """Return log(p / (1 - p)) of the label's probability p, and the logarithms of the softmax over the other classes.

    1 - p is never computed from a rounded p: the other classes have a log-sum-exp of their own.
    """
    others = z.masked_fill(is_label, -math.inf)
    none = (others == -math.inf).all(1)
    log_sum = others.masked_fill(none[:, None], 0).logsumexp(1)
    label = torch.where(is_label, z, 0).sum(1)
    margin = label.masked_fill(label == math.inf, math.nan) - log_sum.masked_fill(none, -math.inf)
    return margin, others - log_sum[:, None]


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return p log(p / q), and 0 where p = 0."""
    p = log_p.exp()
    nothing = p == 0
    return p * (log_p.masked_fill(nothing, 0) - log_q.masked_fill(nothing, 0))
