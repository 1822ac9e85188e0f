"""Inter-class correlation in plain PyTorch, computed from logarithms: the specification of ``icc``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd import recomputed
from ..congruence.plan import known

CHUNK = 2**24  # elements of the b x rows x K matrices that are held together


def icc_map(logits: Tensor, mask: Tensor | None = None, class_mask: Tensor | None = None) -> Tensor:
    """M = (1/b) Σ_s P_s (ICCT Eqs. 5-6), K x K, over the samples that count. It is 0 at classes that are not there."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted = Counted(z, mask, class_mask)
    (z,) = counted.zeroed(z)
    rows = [_in_part(_log_map, rows, z, *counted.masks).exp() for rows in _row_chunks(z)]
    return counted.map(torch.cat(rows))


def icc_loss(
    student: Tensor,
    teacher: Tensor,
    per_sample: bool,
    scale: float = 1.0,
    mask: Tensor | None = None,
    class_mask: Tensor | None = None,
) -> Tensor:
    """Return ``scale`` times KL(M_T ‖ M_S) summed over the map (ICCT Eq. 7), or times the mean KL of each
    sample's P.
    """
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    z_s, z_t = student.to(dtype), teacher.to(dtype)
    counted = Counted(z_s, mask, class_mask)
    z_s, z_t = counted.zeroed(z_s, z_t)
    divergence = _divergence_of_samples if per_sample else _divergence_of_maps
    first, *others = (_in_part(divergence, rows, z_s, z_t, *counted.masks) for rows in _row_chunks(z_s))
    return scale * sum(others, first)


class Counted:
    """The samples that count and the classes that are there. Without one, all are there, with logits of 0."""

    def __init__(self, z: Tensor, mask: Tensor | None, class_mask: Tensor | None) -> None:
        self.given = mask, class_mask
        self.masks = tuple(x if x is None else x | ~x.any() for x in self.given)

    def zeroed(self, *logits: Tensor) -> tuple[Tensor, ...]:
        mask, class_mask = self.given
        if mask is not None:
            logits = tuple(z.masked_fill(~mask[:, None], 0) for z in logits)
        if class_mask is not None:
            logits = tuple(z.masked_fill(~class_mask, 0) for z in logits)
        return logits

    def map(self, full: Tensor) -> Tensor:
        mask, class_mask = self.given
        if mask is not None:
            full = full.masked_fill(~mask.any(), 0)
        if class_mask is not None:
            full = full.masked_fill(~(class_mask[:, None] & class_mask), 0)
        return full


def _divergence_of_maps(
    rows: slice, z_s: Tensor, z_t: Tensor, mask: Tensor | None = None, class_mask: Tensor | None = None
) -> Tensor:
    log_q, log_p = (_log_map(rows, z, mask, class_mask) for z in (z_s, z_t))
    return _divergence(log_q, log_p, rows, None, class_mask)


def _divergence_of_samples(
    rows: slice, z_s: Tensor, z_t: Tensor, mask: Tensor | None = None, class_mask: Tensor | None = None
) -> Tensor:
    log_q, log_p = (log_correlations(rows, z, class_mask) for z in (z_s, z_t))
    samples = log_q.shape[0] if mask is None else mask.sum()
    return _divergence(log_q, log_p, rows, mask, class_mask) / samples


def _divergence(log_q: Tensor, log_p: Tensor, rows: slice, mask: Tensor | None, class_mask: Tensor | None) -> Tensor:
    """Return Σ p log(p / q) over whole rows as the sum of p (d + exp(-d) - 1) with d = log(p / q). No term is negative,
    so a small divergence is as precise as a large one. Entries that do not count have d = 0.
    """
    if class_mask is not None:
        there = class_mask[rows, None] & class_mask
        log_q, log_p = (x.masked_fill(~there, 0) for x in (log_q, log_p))
    if mask is not None:
        log_q, log_p = (x.masked_fill(~mask[:, None, None], 0) for x in (log_q, log_p))
    d, p = log_p - log_q, log_p.exp()
    near = d.clamp(-0.5, 0.5)  # outside of this range exp(-d) may overflow, and p exp(-d) is q
    return torch.where(d.abs() < 0.5, p * (near + torch.expm1(-near)), p * d - p + log_q.exp()).sum()


def _log_map(rows: slice, z: Tensor, mask: Tensor | None = None, class_mask: Tensor | None = None) -> Tensor:
    """Return rows of log M, by log-sum-exp over the samples (Eq. 6). It is 0 for classes that are not there."""
    log_p = log_correlations(rows, z, class_mask)
    if mask is None:
        return torch.logsumexp(log_p, dim=0) - z.new_full((), z.shape[0]).log()
    return torch.logsumexp(log_p.masked_fill(~mask[:, None, None], -math.inf), dim=0) - mask.sum().to(z.dtype).log()


def log_correlations(rows: slice, z: Tensor, class_mask: Tensor | None = None) -> Tensor:
    """Return rows of log P = log softmax(z zᵀ) of every sample (Eq. 5), b x rows x K. It is 0 at classes that are not
    there.
    """
    z_i = z[:, rows, None]
    extremes = z.detach()
    if class_mask is not None:
        highest, lowest = extremes.masked_fill(~class_mask, -math.inf), extremes.masked_fill(~class_mask, math.inf)
    else:
        highest = lowest = extremes
    # The row's largest product is z_i times the largest or the smallest logit. It is subtracted before it is rounded.
    # Products of confident logits are in the hundreds, where float32 has lost the digits that exp needs.
    largest, smallest = highest.amax(1)[:, None, None], lowest.amin(1)[:, None, None]
    products = z_i * (z[:, None] - torch.where(z_i < 0, smallest, largest))
    if class_mask is None:
        return F.log_softmax(products, dim=2)
    return F.log_softmax(products.masked_fill(~class_mask, -math.inf), dim=2).masked_fill(~class_mask, 0)


def _row_chunks(z: Tensor) -> Iterator[slice]:
    batch, classes = z.shape
    step = max(1, CHUNK // (known(batch) * classes))
    return (slice(begin, begin + step) for begin in range(0, classes, step))


def _in_part(function: Callable[..., Tensor], rows: slice, z: Tensor, *others: Tensor | None) -> Tensor:
    """Return ``function`` of all rows, or of one chunk. For a chunk, intermediate results are not kept."""
    if rows.stop >= z.shape[1] and rows.start == 0:
        return function(rows, z, *others)
    return recomputed(function, rows, z, *others)
