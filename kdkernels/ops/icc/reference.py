"""Inter-class correlation in plain PyTorch, in logarithms throughout: the specification of ``icc``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd import recomputed
from ..congruence.plan import known

CHUNK = 2**24  # elements of the b x rows x K matrices that are held at once


def icc_map(logits: Tensor) -> Tensor:
    """M = (1/b) Σ_s P_s (ICCT Eqs. 5-6), K x K."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.cat([_in_part(_log_map, rows, z).exp() for rows in _row_chunks(z)])


def icc_loss(student: Tensor, teacher: Tensor, per_sample: bool, scale: float = 1.0) -> Tensor:
    """KL(M_T ‖ M_S) summed over the map (ICCT Eq. 7), or that of each sample's P averaged; times ``scale``."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    z_s, z_t = student.to(dtype), teacher.to(dtype)
    divergence = _divergence_of_samples if per_sample else _divergence_of_maps
    return scale * sum(_in_part(divergence, rows, z_s, z_t) for rows in _row_chunks(z_s))


def _divergence_of_maps(rows: slice, z_s: Tensor, z_t: Tensor) -> Tensor:
    return _divergence(_log_map(rows, z_s), _log_map(rows, z_t))


def _divergence_of_samples(rows: slice, z_s: Tensor, z_t: Tensor) -> Tensor:
    log_q, log_p = log_correlations(rows, z_s), log_correlations(rows, z_t)
    return _divergence(log_q, log_p) / log_q.shape[0]


def _divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Σ p log(p / q) over whole rows as the sum of p (d + exp(-d) - 1) with d = log(p / q): no term is negative, so
    that a small divergence is as precise as a large one."""
    d, p = log_p - log_q, log_p.exp()
    near = d.clamp(-0.5, 0.5)  # beyond it, where exp(-d) may overflow, p exp(-d) is q
    return torch.where(d.abs() < 0.5, p * (near + torch.expm1(-near)), p * d - p + log_q.exp()).sum()


def _log_map(rows: slice, z: Tensor) -> Tensor:
    """Rows of log M, by log-sum-exp over the samples (Eq. 6)."""
    return torch.logsumexp(log_correlations(rows, z), dim=0) - z.new_full((), z.shape[0]).log()


def log_correlations(rows: slice, z: Tensor) -> Tensor:
    """Rows of log P = log softmax(z zᵀ) of every sample (Eq. 5), b x rows x K."""
    z_i = z[:, rows, None]
    # The row's largest product is z_i times the largest or the smallest logit. It is taken off before it is rounded:
    # products of confident logits are in the hundreds, where float32 has lost the digits that exp shows.
    largest, smallest = z.detach().amax(1)[:, None, None], z.detach().amin(1)[:, None, None]
    return F.log_softmax(z_i * (z[:, None] - torch.where(z_i < 0, smallest, largest)), dim=2)


def _row_chunks(z: Tensor) -> Iterator[slice]:
    batch, classes = z.shape
    step = max(1, CHUNK // (known(batch) * classes))
    return (slice(begin, begin + step) for begin in range(0, classes, step))


def _in_part(function: Callable[..., Tensor], rows: slice, *logits: Tensor) -> Tensor:
    """``function`` of all rows, or of one chunk of many: then its intermediate results are not kept."""
    if rows.stop >= logits[0].shape[1] and rows.start == 0:
        return function(rows, *logits)
    return recomputed(function, rows, *logits)
